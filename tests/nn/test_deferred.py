# SPDX-License-Identifier: Apache-2.0
"""Deferred norms and outputs: fused where they are used as in a block, else what torch computes."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dtq
from dtq.kernels.table import compiled
from dtq.nn import deferred
from dtq.nn.deferred import DeferredNorm, DeferredOutput, DeferringNorm, defer

pytestmark = pytest.mark.skipif(not compiled("cpu"), reason="without compiled kernels")


@pytest.fixture(autouse=True)
def _small_inputs_too(monkeypatch):
    monkeypatch.setattr(deferred, "LEAST_ELEMENTS", 1)


class Ops(TorchDispatchMode):
    """Counts calls of ops by name."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def counted(call):
    with torch.no_grad(), Ops() as ops:
        result = call()
    return result, ops.count


@pytest.fixture(scope="module")
def dit():
    return dtq.quantize(tiny.dit(), "rtn-w4a8", progress=False).eval()


def given(model):
    size = model.config.sample_size
    labels = {"timestep": torch.tensor([5, 5]), "class_labels": torch.tensor([1, 2])}
    return {"hidden_states": torch.randn(2, 4, size, size), "return_dict": False} | labels


def test_blocks_are_fused_in_eager_mode(dit):
    inputs = given(dit)
    (got,), fused = counted(lambda: dit(**inputs))
    defer(dit, False)
    (want,), apart = counted(lambda: dit(**inputs))
    defer(dit)
    blocks = len(dit.transformer_blocks)
    assert type(got) is torch.Tensor
    assert (got - want).norm() < 2e-3 * want.norm()
    assert fused["dtq::norm_quantize_rows"] == 2 * blocks  # once for q, k and v
    assert "dtq::norm_quantize_rows" not in apart
    # the inputs of to_out and of the second linear of the feed-forward
    assert fused["dtq::quantize_rows"] == 2 * blocks
    assert apart["dtq::quantize_rows"] == 6 * blocks
    assert fused["aten::native_layer_norm"] == 1  # the last one


def test_what_sees_a_result_gets_it_at_once(dit):
    inputs, seen, block = given(dit), [], dit.transformer_blocks[0]
    with torch.no_grad():
        want = dit(**inputs)[0]
    watched = block.norm1.norm, block.ff.net[2]
    hooks = [m.register_forward_hook(lambda m, args, y: seen.append(type(y))) for m in watched]
    with torch.no_grad():
        got = dit(**inputs)[0]
    for hook in hooks:
        hook.remove()
    assert seen == [torch.Tensor, torch.Tensor]
    assert (got - want).norm() < 2e-3 * want.norm()
    with torch.inference_mode():
        assert type(block.norm1.norm(torch.ones(1, 2, 128))) is torch.Tensor
    assert type(block.norm1.norm(torch.ones(1, 2, 128))) is torch.Tensor  # with gradients


@torch.no_grad()
def test_other_uses_have_the_bits_of_torch():
    plain = nn.LayerNorm(8, elementwise_affine=False)
    norm = nn.LayerNorm(8, elementwise_affine=False)
    norm.__class__ = DeferringNorm
    x, factor, shift = torch.randn(2, 5, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    assert type(norm(x) * factor + shift) is DeferredNorm
    for use in (
        lambda y: y.clone(),
        lambda y: y[0],
        lambda y: (y * factor).sum(),
        lambda y: (factor * y + shift).transpose(1, 2),
        lambda y: y + shift,
        lambda y: (y * factor + x).relu(),
        lambda y: (1 / y).sum(),
        lambda y: y * factor * factor + shift + shift + y,
        lambda y: torch.cat([y, x]),
    ):
        got, want = use(norm(x)), use(plain(x))
        got = got.value() if isinstance(got, DeferredNorm) else got
        assert torch.equal(got, want)
    y, w = norm(x), torch.randn(3, 8)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y @ w.T


@torch.no_grad()
def test_linears_quantize_whatever_the_norm_is_modulated_with(dit):
    linear, norm = dit.transformer_blocks[0].attn1.to_q, dit.transformer_blocks[0].norm1.norm
    x, factor, shift = torch.randn(2, 5, 128), torch.randn(1, 1, 128), torch.randn(1, 1, 128)
    for y in (norm(x), norm(x) * factor, factor * norm(x) + shift):
        want = linear(y.value())
        assert (linear(y) - want).norm() < 2e-3 * want.norm()


@torch.no_grad()
def test_an_output_without_gate_or_residual_is_that_of_the_linear(dit):
    linear = dit.transformer_blocks[0].ff.net[2]
    x, gate = torch.randn(2, 5, linear.in_features), torch.randn(2, 1, linear.out_features)
    linear.defers = False
    want = linear(x)
    linear.defers = True
    y = linear(x)
    assert type(y) is DeferredOutput
    assert torch.equal(y / 1.0 + 0.0, want)
    assert torch.equal((gate * linear(x)).clone(), gate * want)
    fused = gate * linear(x) + want
    assert type(fused) is torch.Tensor
    torch.testing.assert_close(fused, gate * want + want)


def test_small_inputs_are_computed_at_once(dit, monkeypatch):
    monkeypatch.setattr(deferred, "LEAST_ELEMENTS", 3 * 128 + 1)
    norm = dit.transformer_blocks[0].norm1.norm
    with torch.no_grad():
        assert type(norm(torch.ones(1, 3, 128))) is torch.Tensor
        assert type(norm(torch.ones(1, 4, 128))) is DeferredNorm


def test_unquantized_models_do_not_defer(dit):
    model = dtq.quantize(tiny.dit(), "rtn-w4a8", progress=False)
    assert any(type(m) is DeferringNorm for m in model.modules())
    model.dequantize()
    assert not any(type(m) is DeferringNorm for m in model.modules())
