# SPDX-License-Identifier: Apache-2.0
"""Layers with the same input and the same input transform."""

from __future__ import annotations

import re

import torch
from torch import nn

from dtq.formats import PackedTensors
from dtq.nn.linear import TRANSFORM_TENSORS, QuantLinear


def share_input_transforms(model: nn.Module) -> None:
    """Mark layers of a block with equal input transforms, such as q, k and v, as sharing one."""
    firsts: dict[tuple[object, ...], list[QuantLinear]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLinear) or not _transform_tensors(layer):
            continue
        layer.share_input_with(None)
        block = re.match(r".*?\.\d+(?=\.)", name)
        rotation = layer.problem.hadamard_block, layer.problem.num_rotations
        key = (block and block[0], layer.in_features, *rotation, layer.activation_format)
        known = firsts.setdefault(key, [])
        first = next((other for other in known if _same_transform(layer, other)), None)
        if first is None:
            known.append(layer)
        else:
            layer.share_input_with(first)


def _transform_tensors(layer: QuantLinear) -> PackedTensors:
    specs = layer.tensor_specs()
    return {name: layer.packed_tensor(name) for name in TRANSFORM_TENSORS if name in specs}


def _same_transform(a: QuantLinear, b: QuantLinear) -> bool:
    mine, others = _transform_tensors(a), _transform_tensors(b)
    return mine.keys() == others.keys() and all(
        not x.is_meta and x.device == others[name].device and torch.equal(x, others[name])
        for name, x in mine.items()
    )
