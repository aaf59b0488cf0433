# SPDX-License-Identifier: Apache-2.0
"""Weight-only convolutions: they compute what the float convolution of their numbers does."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn

from dtq.formats import FORMATS
from dtq.models.linears import matrix_shape
from dtq.nn.conv import QuantConv
from dtq.plan.layers import LayerSpec


def cases() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "1d": nn.Conv1d(8, 6, 5, stride=2, padding=2),
        "2d": nn.Conv2d(8, 6, 3, padding=1),
        "circular": nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"),
        "grouped": nn.Conv2d(8, 8, 3, groups=4, bias=False),
        "causal": WanCausalConv3d(8, 6, 3, padding=1),
    }


def quantized(old: nn.Module, name: str = "int8-row") -> QuantConv:
    fmt, w = FORMATS[name], old.weight.detach().flatten(1)
    new = QuantConv.in_place_of(old, LayerSpec(name, "none"), compute_dtype=old.weight.dtype)
    new.fill(fmt.pack(w, fmt.compute_qparams(w)))
    return new


def input_of(module: nn.Module) -> torch.Tensor:
    return torch.randn(2, 8, *[7] * len(module.kernel_size))


@pytest.mark.parametrize("name", cases())
def test_it_is_the_convolution_of_the_rounded_weight(name):
    old = cases()[name]
    new, x = quantized(old), input_of(old)
    assert isinstance(new, type(old))
    assert new.weight.dtype == torch.int8
    assert new.weight.shape == matrix_shape(old)
    want, exact = old(x), copy.deepcopy(old)
    fmt, w = FORMATS["int8-row"], old.weight.detach().flatten(1)
    exact.weight.data = fmt.fake_quantize(w, fmt.compute_qparams(w)).view_as(old.weight)
    assert torch.equal(new(x), exact(x))
    assert 0 < float((new(x) - want).square().sum() / want.square().sum()) < 1e-3
    plain = new.unquantized()
    assert type(plain) is type(old)
    assert torch.equal(plain(x), exact(x))


@pytest.mark.parametrize("name", cases())
def test_copies_pickles_and_casts(name):
    new = quantized(cases()[name])
    x = input_of(new)
    assert torch.equal(copy.deepcopy(new)(x), new(x))
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), new(x))
    half = copy.deepcopy(new).to(torch.bfloat16)
    assert half.weight.dtype == torch.int8
    assert half(x.bfloat16()).dtype == torch.bfloat16
