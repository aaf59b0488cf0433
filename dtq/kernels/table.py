# SPDX-License-Identifier: Apache-2.0
"""``KERNELS``: the kernels of a quantized linear, in order of preference. The last supports all.

A kernel is chosen once, when a layer is built, never per call. A row is one arithmetic on every
device: its ops run compiled where a library has them and as torch reference elsewhere, with the
same results, so a layer may move between devices. There are three exceptions on a GPU. The int8
rows leave problems that are too small for int8 to float. FP4 is multiplied by hardware that can
(``gpu_dispatch.py``). Integers with float scales per group are decoded and multiplied in float.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.kernels.float_gemm import FLOAT_PRODUCT, FP4, REFERENCE, WEIGHT_ONLY
from dtq.kernels.graph_constant import graph_constant
from dtq.kernels.int8_gemm import (
    INTEGER_GROUPS,
    W3A8,
    W4A8_EXPANDED,
    W4A8_ROW,
    W4A8_TABLE,
    W4A8_TWO_LEVEL,
    W8A8,
)
from dtq.kernels.kernel import Epilogue, Kernel, LinearProblem
from dtq.kernels.libraries import LIBRARIES

__all__ = ["KERNELS", "Epilogue", "Kernel", "LinearProblem", "branch_joins", "compiled", "pick"]

KERNELS: tuple[Kernel, ...] = (
    W8A8,
    W4A8_TWO_LEVEL,
    W4A8_ROW,
    W3A8,
    W4A8_TABLE,
    W4A8_EXPANDED,
    WEIGHT_ONLY,
    FP4,
    INTEGER_GROUPS,
    FLOAT_PRODUCT,
    REFERENCE,
)
"""Every kernel, in order of preference."""


def pick(problem: LinearProblem) -> Kernel:
    """The first kernel of the table that supports a problem."""
    return next(kernel for kernel in KERNELS if kernel.unsupported_reason(problem) is None)


@graph_constant
def compiled(device: str) -> bool:
    """Whether there are compiled kernels for a device; the first call for a device loads them."""
    return device in LIBRARIES and LIBRARIES[device].load()


def branch_joins(x: Tensor, rank: int) -> bool:
    """Whether the compiled GEMM for ``x`` adds a low-rank branch of this rank, as on a GPU."""
    halves = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and halves and rank % 16 == 0 and compiled("cuda")
