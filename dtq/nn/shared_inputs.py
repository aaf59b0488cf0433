# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same input with the same transform."""

from __future__ import annotations

import re

import torch
from torch import nn

from dtq.nn.linear import CHANGE, QuantLinear


def share_changes(model: nn.Module) -> None:
    """Let layers of a block that change their input alike, as q, k and v do, follow the first."""
    firsts: dict[tuple[object, ...], list[QuantLinear]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLinear) or not any(n in layer.specs() for n in CHANGE):
            continue
        layer.follow(None)
        block = re.match(r".*?\.\d+(?=\.)", name)
        key = block and block[0], layer.in_features, layer.task.block, layer.task.turns, layer.acts
        known = firsts.setdefault(key, [])
        first = next((other for other in known if _change_alike(layer, other)), None)
        if first is None:
            known.append(layer)
        else:
            layer.follow(first)


def _change_alike(a: QuantLinear, b: QuantLinear) -> bool:
    for name in CHANGE:
        if (name in a.specs()) != (name in b.specs()):
            return False
        if name in a.specs():
            x, y = a.part(name), b.part(name)
            if x.is_meta or x.device != y.device or not torch.equal(x, y):
                return False
    return True
