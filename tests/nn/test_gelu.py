# SPDX-License-Identifier: Apache-2.0
"""GELU of a quantized model on a CPU: close to torch's, and torch's own if a gradient is required."""

from __future__ import annotations

import copy
import functools

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import nn

import dtq
from dtq.kernels import gpu_fusion
from dtq.nn.gelu import FastGELU, FastProjectedGELU, use_fast_gelu


@functools.cache
def _quantized(name: str) -> nn.Module:
    return dtq.quantize(tiny.TRANSFORMERS[name](), "w8a8", progress=False, transform="none")


def quantized(name: str) -> nn.Module:
    return copy.deepcopy(_quantized(name))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.exact = nn.GELU("tanh"), nn.GELU()
        self.projected, self.other = GELU(16, 32, "tanh"), GELU(16, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_tanh_form_is_replaced_and_it_is_close(dtype):
    model = Model().to(dtype)
    before = copy.deepcopy(model)
    use_fast_gelu(model)
    use_fast_gelu(model)
    kinds = [type(m) for m in (model.plain, model.exact, model.projected, model.other)]
    assert kinds == [FastGELU, nn.GELU, FastProjectedGELU, GELU]
    x = torch.linspace(-6, 6, 800).reshape(50, 16).to(dtype)
    with torch.no_grad():
        for name in ("plain", "exact", "projected", "other"):
            got, want = (getattr(m, name)(x).float() for m in (model, before))
            atol = 1e-6 if dtype == torch.float32 else 1e-5
            torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps * 2, atol=atol)


def test_gradients_are_those_of_torch():
    model = Model()
    use_fast_gelu(model)
    x = torch.randn(4, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(model.plain(x).sum(), x)
    (want,) = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)
    assert torch.equal(grad, want)


def test_quantized_and_loaded_models_have_it(tmp_path):
    model = dtq.quantize(tiny.dit(), "rtn-w4a8", progress=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for each in (model, loaded):
        gelus = [m for m in each.modules() if isinstance(m, GELU)]
        assert gelus
        assert all(type(m) is FastProjectedGELU for m in gelus)


def test_it_compiles():
    model = Model()
    use_fast_gelu(model)
    torch._dynamo.reset()
    x = torch.randn(4, 16)
    with torch.no_grad():
        whole = torch.compile(model.projected, fullgraph=True, backend="eager")
        assert torch.equal(whole(x), model.projected(x))


GELUS = ("w8a8", "w4a8-two-level", "w4a8-row")


def test_it_stays_apart_where_the_epilogue_is_estimated_slower(monkeypatch):
    model = dtq.quantize(tiny.dit(), "rtn-w4a8", progress=False).bfloat16()
    module = next(m for m in model.modules() if isinstance(m, FastProjectedGELU))
    x, asked = torch.randn(3, 40, module.proj.in_features).bfloat16(), []
    with torch.no_grad():
        fused = module.proj.gelu(x)
        monkeypatch.setattr(gpu_fusion, "is_fused", lambda pattern, x: asked.append(pattern))
        assert module.proj.gelu(x) is None
        assert torch.equal(module(x), module.gelu(module.proj(x)))
    assert fused is None or set(asked) == {"gelu"}  # not asked without compiled kernels


@pytest.mark.parametrize("recipe", ["rtn-w4a8", "w8a8", "w4a8", "w3a8", "lrq-dit"])
def test_it_is_the_epilogue_of_the_linear_before_it(recipe):
    settings = {"solver": "rtn", "transform_candidates": ()} if recipe in ("w4a8", "w3a8") else {}
    model = dtq.quantize(tiny.dit(), recipe, progress=False, **settings).bfloat16()
    gelus = [m for m in model.modules() if isinstance(m, FastProjectedGELU)]
    assert gelus
    for module in gelus:
        x = torch.randn(3, 40, module.proj.in_features).bfloat16()
        with torch.no_grad():
            apart = module.gelu(module.proj(x))
            once = module.proj.gelu(x)
            assert (once is not None) == (module.proj.kernel.name in GELUS)
            together = module(x)
            if once is None:
                assert torch.equal(together, apart)
                continue
            assert torch.equal(together, once)
            torch.testing.assert_close(together, apart, rtol=2**-6, atol=2**-8)
            exact = F.gelu(module.proj.float()(x.float()), approximate="tanh")
            module.proj.bfloat16()
            errors = [(y.float() - exact).norm() for y in (together, apart)]
            assert errors[0] < errors[1]  # one rounding less
            seen = []
            handle = module.proj.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y))
            assert torch.equal(module(x), apart)
            handle.remove()
            assert len(seen) == 1
        x.requires_grad_()
        assert torch.equal(module(x).detach(), apart)


def patched_forward(linear):
    before = linear.forward
    linear.forward = lambda x: before(x) + 1


def patched_class(linear):
    class Shifted(type(linear)):
        def forward(self, x):
            return super().forward(x) + 1

    linear.__class__ = Shifted


def hooked(linear):
    linear.register_forward_hook(lambda module, args, y: y + 1)


@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
@pytest.mark.parametrize("change", [patched_forward, patched_class, hooked])
def test_whatever_stands_at_forward_is_called(name, change):
    model = quantized(name)
    for module in [m for m in model.modules() if isinstance(m, FastProjectedGELU)]:
        x = torch.randn(2, 3, module.proj.in_features)
        with torch.no_grad():
            want = module.gelu(module.proj(x) + 1)
            change(module.proj)
            assert torch.equal(module(x), want)
            module.gelu = lambda gate: gate
            assert torch.equal(module(x), module.proj(x))


def test_hooks_of_all_modules_are_called():
    model = quantized("dit")
    module = next(m for m in model.modules() if isinstance(m, FastProjectedGELU))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(m))
    with torch.no_grad():
        module(torch.randn(2, module.proj.in_features))
    handle.remove()
    assert module.proj in seen


def test_a_forward_that_is_put_back_is_fused_again():
    model = quantized("dit")
    module = next(m for m in model.modules() if isinstance(m, FastProjectedGELU))
    x = torch.randn(2, module.proj.in_features)
    with torch.no_grad():
        before = module(x)
        module.proj.forward = module.proj.forward
        assert torch.equal(module(x), before)


def test_it_is_a_separate_op_after_a_linear_with_an_adapter():
    model = quantized("sd3")
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["net.0.proj"], init_lora_weights=False))
    (module, *_) = [m for m in model.modules() if isinstance(m, FastProjectedGELU)]
    x = torch.randn(2, module.proj.in_features)
    with torch.no_grad():
        assert torch.equal(module(x), module.gelu(module.proj(x)))


def test_it_compiles_with_its_linear():
    model = quantized("dit")
    (module, *_) = [m for m in model.modules() if isinstance(m, FastProjectedGELU)]
    x = torch.randn(2, 5, module.proj.in_features)
    torch._dynamo.reset()
    with torch.no_grad():
        whole = torch.compile(module, fullgraph=True, backend="eager")
        assert torch.equal(whole(x), module.proj.gelu(x))
