# SPDX-License-Identifier: Apache-2.0
"""optimum-quanto without its C++, which takes half a minute to compile and gives the same."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from dtq.bench.other_libraries import installed


class Extension:
    """What its C++ extension offers."""

    def unpack(self, packed: Tensor, bits: int) -> Tensor:
        """Codes of ``bits`` bits, lowest first, one after another along the first axis."""
        return torch.cat([(packed >> low) & (2**bits - 1) for low in range(0, 8, bits)])


def in_python() -> None:
    """For the rest of this process; nothing where it is not installed."""
    if installed("optimum.quanto"):
        importlib.import_module("optimum.quanto.library.extensions.cpp").ext._lib = Extension()
