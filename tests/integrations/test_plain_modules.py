# SPDX-License-Identifier: Apache-2.0
"""A denoiser of no library: quantized, saved, loaded into a model that the user builds."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import dtq
from dtq.errors import CheckpointError, InputError
from dtq.nn import QuantLinear
from dtq.nn.embedding import QuantEmbedding

COARSE = {"transform": {"search": {"step": 0.25, "max_error_ratio": 1.0}}}


class Block(nn.Module):
    """A block as in the paper of DiT: modulation from the condition, attention, feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        q, k, v = (
            self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, 4, -1)).unbind(2)
        )
        heads = [t.transpose(1, 2) for t in (q, k, v)]  # (B, 4, tokens, width / 4)
        y = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + gate1 * self.proj(y)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Denoiser(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.time_embed = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c, x = self.time_embed(t[:, None]), self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)


def calls() -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(2, 16, 4, generator=rng), "t": torch.full((2,), t)}
        for t in (0.9, 0.7, 0.5, 0.3, 0.1)
    ]


def made(recipe: str, **more) -> tuple[nn.Module, Tensor, Tensor]:
    """The quantized model, and the outputs of the float and the quantized one."""
    torch.manual_seed(0)
    model = Denoiser().eval()
    with torch.no_grad():
        want = model(**calls()[2])
        dtq.quantize(model, recipe, inputs=calls(), progress=False, **more)
        return model, want, model(**calls()[2])


@pytest.mark.parametrize("recipe", ["w4a8", "w8a8", "w4a16", "q-dit", "viditq"])
def test_round_trip(recipe, tmp_path):
    search = COARSE if recipe in ("w4a8", "w8a8") else {}
    model, want, got = made(recipe, **search)
    roles = {layer.name: layer.role for layer in model.hf_quantizer.report.plan.layers}
    assert roles["blocks.0.qkv"] == "attn.qkv"
    assert roles["blocks.1.mlp.2"] == "ffn.down"
    assert roles["blocks.1.modulation.1"] == "adaln"
    assert isinstance(model.blocks[0].qkv, QuantLinear)
    assert isinstance(model.head, nn.Linear)
    assert 0 < float((got - want).square().sum() / want.square().sum()) < 0.02
    dtq.save(model, tmp_path / "one", shard="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    with torch.device("meta"):
        empty = Denoiser()
    loaded = dtq.load_into(empty, tmp_path / "one")
    with torch.no_grad():
        assert torch.equal(loaded(**calls()[2]), got)
    dtq.save(loaded, tmp_path / "two", shard="20KB")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_static_scales_per_timestep_are_loaded(tmp_path):
    model, _, _ = made(
        "rtn-w4a8", activations="int8-static-timestep", calibration={"num_timestep_bins": 3}
    )
    dtq.save(model, tmp_path)
    loaded = dtq.load_into(Denoiser(), tmp_path)
    assert loaded.blocks[0].qkv.bins == 3
    with torch.no_grad():
        for call in calls():
            assert torch.equal(loaded(**call), model(**call))


def test_a_cast_is_saved_and_loaded(tmp_path):
    model, _, _ = made("rtn-w4a8")
    model.to(torch.bfloat16)
    call = {k: v.bfloat16() for k, v in calls()[0].items()}
    dtq.save(model, tmp_path / "one")
    loaded = dtq.load_into(Denoiser(), tmp_path / "one")
    assert loaded.blocks[0].qkv.compute_dtype == torch.bfloat16
    assert loaded.hf_quantizer.quantization_config.compute_dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(**call), model(**call))


def test_float_tensors_that_do_not_fit_are_named(tmp_path):
    model, _, _ = made("rtn-w4a8")
    folder = dtq.save(model, tmp_path / "out")
    other = Denoiser()
    other.head = nn.Linear(64, 5)
    with pytest.raises(CheckpointError, match=r"head\.weight has shape"):
        dtq.load_into(other, folder)
    more = Denoiser()
    more.extra = nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match=r"extra\.weight of the model is missing"):
        dtq.load_into(more, folder)
    fewer = Denoiser()
    fewer.head = nn.Linear(64, 4, bias=False)
    with pytest.raises(CheckpointError, match=r"the model has no tensor head\.bias"):
        dtq.load_into(fewer, folder)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(InputError, match="Denoiser is not quantized"):
        dtq.save(Denoiser(), tmp_path / "no")
    with pytest.raises(InputError, match="no random inputs for this class"):
        dtq.quantize(Denoiser(), "w4a8", progress=False)
    model, _, _ = made("rtn-w4a8")
    folder = dtq.save(model, tmp_path / "out")
    with pytest.raises(InputError, match="quantized already"):
        dtq.load_into(model, folder)
    with pytest.raises(CheckpointError, match="shape"):
        dtq.load_into(Denoiser(128), folder)
    with pytest.raises(InputError, match=r"no config\.json"):
        dtq.load_into(Denoiser(), tmp_path)
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        dtq.load_into(Denoiser(), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not quantized by dtq"):
        dtq.load_into(Denoiser(), folder)


def test_a_denoiser_of_another_library(tmp_path):
    """The MMDiT of the package ``mmdit``: joint attention of text and image tokens."""
    mmdit = pytest.importorskip("mmdit", reason="pip install mmdit")
    torch.manual_seed(0)

    def build() -> nn.Module:
        return mmdit.MMDiT(
            depth=2, dim_text=64, dim_image=64, dim_cond=64, dim_head=16, heads=4, qk_rmsnorm=True
        ).eval()

    rng = torch.Generator().manual_seed(0)
    inputs = [
        {
            "time_cond": torch.randn(2, 64, generator=rng),
            "text_tokens": torch.randn(2, 8, 64, generator=rng),
            "image_tokens": torch.randn(2, 32, 64, generator=rng),
        }
        for _ in range(3)
    ]
    model = build()
    with torch.no_grad():
        want = model(**inputs[0])[1]
        dtq.quantize(model, "w4a8", inputs=inputs, progress=False, **COARSE)
        got = model(**inputs[0])[1]
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) >= 16
    assert 0 < float((got - want).square().sum() / want.square().sum()) < 0.01
    loaded = dtq.load_into(build(), dtq.save(model, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs[0])[1], got)


class Labelled(Denoiser):
    """Its condition is a label, too."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(1000, 64)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        c, x = self.time_embed(t[:, None]) + self.labels(label), self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)


def test_a_table_of_labels_is_a_key_of_the_recipe(tmp_path):
    torch.manual_seed(0)
    model, inputs = Labelled().eval(), [{**c, "label": torch.tensor([3, 999])} for c in calls()]
    with torch.no_grad():
        want = model(**inputs[0])
        recipe = dtq.Recipe.load("rtn-w4a8", embeddings="w4")
        dtq.quantize(model, recipe, inputs=inputs, progress=False)
        got = model(**inputs[0])
    assert isinstance(model.labels, QuantEmbedding)
    assert 0 < float((got - want).square().sum() / want.square().sum()) < 0.1
    dtq.save(model, tmp_path / "m")
    with torch.device("meta"):
        empty = Labelled()
    loaded = dtq.load_into(empty, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs[0]), got)
    with pytest.raises(InputError, match="set embeddings=keep"):
        dtq.quantize(Labelled().eval(), recipe, inputs=inputs, to="torchao", progress=False)
    with pytest.raises(InputError, match="set embeddings=w8"):
        dtq.quantize(Labelled().eval(), "w4a8", inputs=inputs, embeddings="w8", progress=False)
