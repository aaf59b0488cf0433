# SPDX-License-Identifier: Apache-2.0
"""Packed tables of token embeddings: they look up what the float table of their numbers has."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.models.tables import is_table
from dtq.nn import embedding
from dtq.nn.embedding import QuantEmbedding, QuantHead, row_misfit
from dtq.plan.layers import LayerSpec
from dtq.recipe.resolve import EMBEDDINGS

TOKENS, WIDTH = 50, 64
NAMES = [name for name in EMBEDDINGS.values() if name]


def cases() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "plain": nn.Embedding(TOKENS, WIDTH),
        "padded": nn.Embedding(TOKENS, WIDTH, padding_idx=49),
        "scaled": Gemma3TextScaledWordEmbedding(TOKENS, WIDTH, 0, embed_scale=WIDTH**0.5 + 0.3),
        # a token has a parameter of its own
        "marked": marked(T5Gemma2TextScaledWordEmbedding(TOKENS, WIDTH, 0, 1.7, 12)),
    }


def marked(module: nn.Module) -> nn.Module:
    module.eoi_embedding.data.normal_()
    return module


def quantized(old: nn.Module, name: str, kind: type = QuantEmbedding) -> QuantEmbedding:
    fmt, w = FORMATS[name], old.weight.detach()
    new = kind.in_place_of(old, LayerSpec(name, "none"), compute_dtype=w.dtype)
    new.fill(fmt.pack(w, fmt.compute_qparams(w)))
    return new


def rounded(old: nn.Module, name: str) -> nn.Module:
    """The float module with the rounded weight."""
    fmt, w, exact = FORMATS[name], old.weight.detach(), copy.deepcopy(old)
    exact.weight.data = fmt.fake_quantize(w, fmt.compute_qparams(w))
    return exact


IDS = torch.tensor([[3, 3, 0], [7, TOKENS - 1, 12]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", cases())
def test_it_is_the_table_of_the_rounded_rows(case, name):
    old = cases()[case]
    new, exact = quantized(old, name), rounded(old, name)
    assert isinstance(new, type(old))
    assert new.weight.dtype == torch.int8
    assert torch.equal(new(IDS), exact(IDS))
    plain = new.unquantized()
    assert type(plain) is type(old)
    assert plain.padding_idx == old.padding_idx
    assert torch.equal(plain(IDS), exact(IDS))


@pytest.mark.parametrize("case", cases())
def test_only_the_rows_of_the_call_are_unpacked(case, monkeypatch):
    new, seen = quantized(cases()[case], "int8-row"), []
    fmt = FORMATS["int8-row"]

    def unpack(self, tensors):
        seen.append(len(tensors["weight"]))
        return whole(self, tensors)

    whole = type(fmt).unpack
    monkeypatch.setattr(type(fmt), "unpack", unpack)
    new(IDS)
    assert seen == [IDS.numel()]


@pytest.mark.parametrize("ids", [[TOKENS], [-1]])
def test_ids_out_of_range_are_refused_as_torch_does(ids):
    new = quantized(nn.Embedding(TOKENS, WIDTH), "int8-row")
    with pytest.raises(IndexError):
        new(torch.tensor(ids))


@pytest.mark.parametrize("case", cases())
def test_copies_pickles_and_casts(case):
    new = quantized(cases()[case], "int4-2l-g32")
    assert torch.equal(copy.deepcopy(new)(IDS), new(IDS))
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IDS), new(IDS))
    half = copy.deepcopy(new).to(torch.bfloat16)
    assert half.weight.dtype == torch.int8
    assert half(IDS).dtype == torch.bfloat16
    float_half = rounded(cases()[case], "int4-2l-g32").to(torch.bfloat16)
    assert torch.equal(half(IDS), float_half(IDS))
    state = copy.deepcopy(new)
    state.load_state_dict(new.state_dict())
    assert torch.equal(state(IDS), new(IDS))
    with pytest.raises(InputError, match="would change the packed tensors"):
        new.type(torch.float32)


@pytest.mark.parametrize("case", cases())
def test_one_graph(case):
    new = quantized(cases()[case], "int8-row")
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS), new(IDS))


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_computes_with_the_rows_in_parts(bias, monkeypatch):
    torch.manual_seed(0)
    old, x = nn.Linear(WIDTH, TOKENS, bias=bias), torch.randn(2, 3, WIDTH)
    new, exact = quantized(old, "int8-row", QuantHead), rounded(old, "int8-row")
    assert isinstance(new, nn.Linear)
    torch.testing.assert_close(new(x), exact(x))
    monkeypatch.setattr(embedding, "HEAD_CHUNK", 7 * WIDTH)  # a part with one row at the end
    torch.testing.assert_close(new(x), exact(x))
    assert new(x.bfloat16()).dtype == torch.bfloat16
    assert type(new.unquantized()) is nn.Linear


def test_formats_whose_rows_share_a_codebook_do_not_fit():
    assert "for all rows together" in row_misfit("vq-256x4")
    assert [row_misfit(name) for name in NAMES] == ["" for _ in NAMES]


class Offset(nn.Embedding):
    """As learned positions of some encoders: it takes more than ids."""

    def forward(self, ids: torch.Tensor, offset: int = 2) -> torch.Tensor:
        return super().forward(ids + offset)


def test_what_is_no_table():
    assert is_table(nn.Embedding(4, 4))
    assert not is_table(nn.Embedding(4, 4, max_norm=1.0))
    assert not is_table(Offset(4, 4))
    assert not is_table(quantized(nn.Embedding(TOKENS, WIDTH), "int8-row"))
