# SPDX-License-Identifier: Apache-2.0
"""Linears that are timed, quantized as a recipe leaves them. Nothing here needs diffusers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtq.formats import FORMATS
from dtq.nn import QuantLinear
from dtq.plan.layers import LayerSpec
from dtq.transforms import OnlineTransform

RECIPES = {"w8a8": "int8-row", "w4a8": "int4-2l-g64"}
"""Recipes that are timed, and their weight formats."""


def quantized(
    layer: nn.Linear,
    weight_format: str,
    activation_format: str = "int8-row",
    *,
    transformed: bool = True,
) -> QuantLinear:
    """The layer as a recipe leaves it, rounded to nearest, in bfloat16.

    Args:
        layer: float.
        weight_format: a key of ``FORMATS``.
        activation_format: a key of ``ACTIVATION_FORMATS``.
        transformed: whether it scales (by ones) and rotates its input online, and holds the
            weight for such an input.

    Returns:
        The quantized layer.
    """
    fmt, w = FORMATS[weight_format], layer.weight.detach().float()
    block = 64 if transformed and layer.in_features % 64 == 0 else 1
    ones = w.new_ones(layer.in_features, dtype=torch.bfloat16)
    w = OnlineTransform(ones, block).w(w)
    spec = LayerSpec(weight_format, activation_format, block, transformed)
    new = QuantLinear.in_place_of(layer, spec, compute_dtype=torch.bfloat16)
    tensors = fmt.pack(w, fmt.compute_qparams(w))
    if transformed:
        tensors["pre_quant_scale"] = ones[None]
    new.fill(tensors)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().bfloat16(), requires_grad=False)
    return new


def weight_only(layer: nn.Linear, weight_format: str) -> QuantLinear:
    """The layer with packed weights and float activations."""
    return quantized(layer, weight_format, "none", transformed=False)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rows as int8 and their scales: (N, K), (N)."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale
