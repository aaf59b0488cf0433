# SPDX-License-Identifier: Apache-2.0
"""torchao's ``quantize_``, whose tensors diffusers saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from data_free import Quantizer, bytes_of_weights
from torch import Tensor, nn

from dtq.nn import QuantLinear


def config_of(weights: str, activations: str) -> Any:
    """The configuration of torchao for the formats of a layer."""
    from torchao import quantization as ao

    if (weights, activations) == ("int8-row", "int8-row"):
        return ao.Int8DynamicActivationInt8WeightConfig(granularity=ao.PerRow(), version=2)
    if (weights, activations) == ("int8-g64", "none"):
        return ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(64), version=2)
    if (weights, activations) == ("int4-asym-g32", "int8-row"):
        return ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,
            weight_granularity=ao.PerGroup(32),
            weight_mapping_type=ao.MappingType.ASYMMETRIC,
        )
    raise ValueError(f"no configuration of torchao for {weights} and {activations}")


def make(made: nn.Module, floats: nn.Module, path: Path) -> nn.Module:
    """The float model in the layouts of ``made``; in place."""
    from torchao.quantization import quantize_

    formats: dict[tuple[str, str], set[str]] = {}
    for name, layer in made.named_modules():
        if isinstance(layer, QuantLinear):
            formats.setdefault((layer.weight_format, layer.activation_format), set()).add(name)
    for (weights, activations), names in formats.items():
        quantize_(floats, config_of(weights, activations), lambda _, name: name in names)  # noqa: B023
    return floats


def nbytes(model: nn.Module, path: Path) -> int:
    """Bytes of the weights, without symmetric integers' zero points: torchao may store the zeros."""
    zeros = 0
    for weight in model.parameters():
        zero = getattr(weight, "zero_point", None)
        if isinstance(zero, Tensor) and not bool(zero.any()):
            zeros += zero.numel() * zero.element_size()
    return bytes_of_weights(model, path) - zeros


QUANTIZER = Quantizer("torchao", {"torchao": "torchao"}, make, nbytes)
