# SPDX-License-Identifier: Apache-2.0
"""``ARCHS``: which arithmetic a GPU does for a product of M tokens with an int8-able weight (N, K).

A static table by architecture, tokens and operations: nothing is timed when a layer runs, so the
same layer on the same GPU always does the same. Three answers:

- ``few``: each packed weight is read once and multiplied in float; for a handful of tokens, where
  reading weights is all that takes time;
- ``float``: the weight is decoded once and kept, the product is torch's; for products so small
  that quantizing the input costs more than int8 saves;
- ``int8``: the row of ``KERNELS``, with the numbers that every device gives.

The first two do not round the input, so they are at least as close to the float model, but they
are other numbers than a CPU gives, and ``float`` takes 2 bytes a weight. ``DTQ_CUDA_INT8=1`` keeps
int8 at every size: the CPU's numbers, no second copy. Only bfloat16 and float16 inputs come here:
float32 products are slow enough for int8 to win always.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.kernels.compile.cuda import CUDA, OLDEST
from dtq.kernels.compile.nvcc import arch_of

INT8_ONLY = os.environ.get("DTQ_CUDA_INT8") == "1"
"""Whether int8 is kept at every size."""


@dataclass(frozen=True)
class Arch:
    """What is true of GPUs from one capability to the next row's.

    Attributes:
        since: the smallest capability.
        few: most tokens (M) of ``few``; ``kFewTokens`` in ``cuda_ext/launch_rows.h``.
        least: operations (2 M N K) from which ``int8`` pays.
        source: of ``least``.
    """

    since: tuple[int, int]
    small_m: int
    least: float
    source: str


# the model: a quantizing pass of its own, 2 to 2.5 us a launch, int8 as fast as published kernels
ARCHS = (
    Arch((8, 0), 16, 1e9, "modelled for A100: 0.97x at 0.7 GFLOP, 1.18x at 2.7"),
    Arch((8, 6), 16, 0, "modelled for RTX 4090, whose int8 is four times bf16: 1.6x at 0.7 GFLOP"),
    Arch((9, 0), 16, 3e9, "modelled for H200: 0.91x at 2.7 GFLOP, 1.16x at 4.8"),
    Arch((10, 0), 16, 8e9, "modelled for B200: 0.78x at 2.7 GFLOP, 0.98x to 1.15x at 10.9"),
    Arch((12, 0), 16, 0, "as 8.6: int8 is four times bf16"),
)


def arch(capability: tuple[int, int]) -> Arch:
    """The row of a GPU of this capability, 8.0 or later."""
    return max((row for row in ARCHS if row.since <= capability), key=lambda row: row.since)


def choose(capability: tuple[int, int], m: int, n: int, k: int) -> str:
    """``few``, ``float`` or ``int8`` for a product of (M, K) with (N, K)."""
    row = arch(capability)
    return _choose(row.small_m, row.least, m, n, k)


def answer(x: Tensor, n: int) -> str:
    """What is done for ``x`` (M, K) and N outputs: always ``int8`` off the GPU."""
    if INT8_ONLY or not on_gpu(x) or x.dtype not in (torch.bfloat16, torch.float16):
        return "int8"
    few, least = _limits(x.device.index or 0)
    return _choose(few, least, x.shape[0], n, x.shape[1])


FP4_COLUMNS = (64, 128)
"""What the width of a product is a multiple of: of NVFP4, of MXFP4 (``cuda_ext/gemm_plan.h``)."""


def multiplies_fp4(x: Tensor, mx: bool) -> bool:
    """Whether ``x`` (M, K) is on a GPU that multiplies FP4 codes, and K fits its kernel."""
    return on_gpu(x) and x.shape[1] % FP4_COLUMNS[mx] == 0 and _has_fp4(x.device.index or 0)


def _choose(few: int, least: float, m: int, n: int, k: int) -> str:
    if m <= few:
        return "few"
    return "float" if 2 * m * n * k < least else "int8"


def explanation(capability: tuple[int, int], n: int, k: int) -> str:
    """The table for one layer, in words."""
    row = arch(capability)
    first = math.ceil(row.least / (2 * n * k))
    parts = [f"up to {row.small_m} tokens the packed weight times float"]
    if first > row.small_m + 1:
        parts.append(f"then decoded to float below {first} tokens")
    return ", ".join([*parts, "then int8"])


def on_gpu(x: Tensor) -> bool:
    """Whether the tables of this file are about this tensor."""
    return x.is_cuda


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_fp4(index: int) -> bool:
    """Whether a device has FP4 products, and the library the machine code for them."""
    if not torch.cuda.is_available() or not CUDA.load() or CUDA.opened is None:
        return False
    capability = torch.cuda.get_device_capability(index)
    built = CUDA.opened.dtq_cuda_archs().decode().split()
    mine = "sm_120f", f"sm_{arch_of(capability)}"
    return capability[0] == 12 and any(name in built for name in mine)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _limits(index: int) -> tuple[int, float]:
    """``few`` and ``least`` of a device; those of int8 at every size where there are no kernels."""
    # the torch reference decodes slowly
    if not torch.cuda.is_available() or not CUDA.load():
        return -1, 0.0
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return -1, 0.0
    row = arch(capability)
    return row.small_m, row.least
