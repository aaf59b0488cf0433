# SPDX-License-Identifier: Apache-2.0
"""Linears as other libraries quantize them, where these are installed."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

from torch import nn

from dtq.evaluate.baselines import BASELINES

MODULES = {"torchao": "torchao", "quanto": "optimum.quanto", "bnb": "bitsandbytes"}
"""What the baselines import, by the first word of their name."""


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def other_libraries(plain: nn.Linear) -> dict[str, nn.Module]:
    """The bfloat16 layer as each library of ``BASELINES`` that is installed quantizes it."""
    layers = {}
    for name, baseline in BASELINES.items():
        if installed(MODULES[name.split("-")[0]]):
            holder = nn.Sequential(copy.deepcopy(plain))
            baseline.apply(holder, ["0"])
            layers[name] = holder[0]
    return layers


def size_of(name: str, layer: nn.Module) -> int:
    """Bytes of a model, or of a linear that the library of that name quantized."""
    if name in BASELINES:
        linear: Any = layer
        bits = BASELINES[name].bits(layer) * linear.in_features * linear.out_features
        return math.ceil(bits / 8)
    return sum(p.nbytes for p in layer.parameters())
