# SPDX-License-Identifier: Apache-2.0
"""Linears as other libraries quantize them, where these are installed."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import nn

from dtq.bench.packages import installed, versions
from dtq.evaluate.baselines import BASELINES
from dtq.version import __version__

MODULES = {"torchao": "torchao", "quanto": "optimum.quanto", "bnb": "bitsandbytes"}
"""What the baselines import, by the first word of their name."""
PACKAGES = {"torchao": "torchao", "quanto": "optimum-quanto", "bnb": "bitsandbytes"}
"""Their packages, by the same word."""
FLOATS = {"bf16": "bfloat16", "fp32": "float32"}
"""Float rows, and their dtypes."""


def other_libraries(plain: nn.Linear) -> dict[str, nn.Module]:
    """The bfloat16 layer as each library of ``BASELINES`` that is installed quantizes it."""
    layers = {}
    for name, baseline in BASELINES.items():
        if installed(MODULES[name.split("-")[0]]):
            holder = nn.Sequential(copy.deepcopy(plain))
            baseline.apply(holder, ["0"])
            layers[name] = holder[0]
    return layers


def by(name: str) -> str:
    """The package of a linear, its version, and the mode."""
    if name in BASELINES:
        return f"{versions(PACKAGES[name.split('-')[0]])}: {BASELINES[name].about}"
    if name in FLOATS:
        return f"{versions('torch')}: {FLOATS[name]}"
    return f"{dtq_version()}: rotated, rounded to nearest"


def dtq_version() -> str:
    """Of dtq, as :func:`versions` writes it."""
    return f"dtq {__version__}"


def size_of(name: str, layer: nn.Module) -> int:
    """Bytes of a model, or of a linear that the library of that name quantized."""
    if name in BASELINES:
        linear: Any = layer
        bits = BASELINES[name].bits(layer) * linear.in_features * linear.out_features
        return math.ceil(bits / 8)
    return sum(p.nbytes for p in layer.parameters())
