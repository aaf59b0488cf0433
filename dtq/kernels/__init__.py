# SPDX-License-Identifier: Apache-2.0
"""The ops and the table of kernels that implement a quantized product."""

from __future__ import annotations

from dtq.kernels import ops as _ops  # noqa: F401  (importing it registers the ops)
from dtq.kernels.compile.cpu import CPU
from dtq.kernels.compile.cuda import CUDA
from dtq.kernels.explain import explain, on
from dtq.kernels.libraries import LIBRARIES
from dtq.kernels.table import KERNELS, Kernel, LinearProblem, pick

__all__ = [
    "CPU",
    "CUDA",
    "KERNELS",
    "LIBRARIES",
    "Kernel",
    "LinearProblem",
    "explain",
    "load",
    "on",
    "pick",
]


def load() -> bool:
    """Compile or load the CPU kernels now instead of at first use; whether they are in use."""
    return CPU.load()
