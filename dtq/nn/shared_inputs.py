# SPDX-License-Identifier: Apache-2.0
"""Layers with the same input and the same input transform."""

from __future__ import annotations

import re

import torch
from torch import nn

from dtq.nn.linear import TRANSFORM_TENSORS, QuantLinear


def share_input_transforms(model: nn.Module) -> None:
    """Mark layers of a block with equal input transforms, such as q, k and v, as sharing one."""
    firsts: dict[tuple[object, ...], list[QuantLinear]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        if not any(n in layer.tensor_specs() for n in TRANSFORM_TENSORS):
            continue
        layer.share_input_with(None)
        block = re.match(r".*?\.\d+(?=\.)", name)
        key = (
            block and block[0],
            layer.in_features,
            layer.problem.hadamard_block,
            layer.problem.num_rotations,
            layer.activation_format,
        )
        known = firsts.setdefault(key, [])
        first = next((other for other in known if _same_transform(layer, other)), None)
        if first is None:
            known.append(layer)
        else:
            layer.share_input_with(first)


def _same_transform(a: QuantLinear, b: QuantLinear) -> bool:
    for name in TRANSFORM_TENSORS:
        if (name in a.tensor_specs()) != (name in b.tensor_specs()):
            return False
        if name in a.tensor_specs():
            x, y = a.packed_tensor(name), b.packed_tensor(name)
            if x.is_meta or x.device != y.device or not torch.equal(x, y):
                return False
    return True
