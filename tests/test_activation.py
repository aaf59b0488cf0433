# SPDX-License-Identifier: Apache-2.0
"""GELU of a quantized model on a CPU: quick, close to torch's, and torch's own where it has to be."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import nn

import dtq
from dtq.nn.activation import QuickGELU, QuickProjectedGELU, quicken


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.exact = nn.GELU("tanh"), nn.GELU()
        self.projected, self.other = GELU(16, 32, "tanh"), GELU(16, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_tanh_form_changes_and_hardly(dtype):
    model = Model().to(dtype)
    before = copy.deepcopy(model)
    quicken(model)
    quicken(model)
    kinds = [type(m) for m in (model.plain, model.exact, model.projected, model.other)]
    assert kinds == [QuickGELU, nn.GELU, QuickProjectedGELU, GELU]
    x = torch.linspace(-6, 6, 800).reshape(50, 16).to(dtype)
    with torch.no_grad():
        for name in ("plain", "exact", "projected", "other"):
            got, want = (getattr(m, name)(x).float() for m in (model, before))
            atol = 1e-6 if dtype == torch.float32 else 1e-5
            torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps * 2, atol=atol)


def test_gradients_are_those_of_torch():
    model = Model()
    quicken(model)
    x = torch.randn(4, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(model.plain(x).sum(), x)
    (want,) = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)
    assert torch.equal(grad, want)


def test_a_quantized_model_has_it_and_a_loaded_one_too(tmp_path):
    model = dtq.quantize(tiny.dit(), "rtn-w4a8", progress=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for made in (model, loaded):
        found = [m for m in made.modules() if isinstance(m, GELU)]
        assert found
        assert all(type(m) is QuickProjectedGELU for m in found)


def test_one_that_torch_compiles():
    model = Model()
    quicken(model)
    torch._dynamo.reset()
    x = torch.randn(4, 16)
    with torch.no_grad():
        whole = torch.compile(model.projected, fullgraph=True, backend="eager")
        assert torch.equal(whole(x), model.projected(x))
