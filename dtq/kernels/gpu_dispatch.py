# SPDX-License-Identifier: Apache-2.0
"""``ARCHS``: which path a GPU takes for M tokens and a weight (N, K) that has an int8 kernel.

A static table by architecture, tokens and operations. Nothing is timed when a layer runs, so the
same layer on the same GPU always takes the same path:

- ``small_m``: each packed weight is read once and multiplied in float. With a handful of tokens
  only reading weights takes time. A format without a compiled decoder takes ``float`` instead.
- ``float``: the weight is decoded once and kept, and torch multiplies. For problems so small that
  quantizing the input costs more than int8 saves. The input transform (smoothing, permutation,
  rotation) is linear, so it is folded into that weight, and such a layer is one ``F.linear``.
- ``int8``: the integer GEMM of the row of ``KERNELS``, with the same results on every device.

The first two do not round the input, so they are at least as close to the float model. Their
results differ from those of a CPU, and ``float`` takes 2 bytes per weight. ``DTQ_CUDA_INT8=1``
takes int8 at every size: the results of the CPU, and no second copy. Only bfloat16 and float16
inputs have a choice: float32 GEMMs are so slow that int8 is always faster.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.kernels.compile.cuda import CUDA, OLDEST
from dtq.kernels.compile.nvcc import arch_of
from dtq.kernels.graph_constant import graph_constant

INT8_ONLY = os.environ.get("DTQ_CUDA_INT8") == "1"
"""Whether int8 is taken at every size."""

FP4_COLUMNS = (64, 128)
"""K has to be a multiple of this for NVFP4 and for MXFP4 products (``cuda_ext/gemm_plan.h``)."""


@dataclass(frozen=True)
class Arch:
    """The choice for GPUs from one compute capability up to that of the next row.

    Attributes:
        since: the lowest compute capability.
        small_m: largest M of the path ``small_m``; equal to ``kSmallMTokens`` of ``launch_rows.h``.
        min_ops: operations (2 M N K) from which ``int8`` is faster than ``float``.
        source: where ``min_ops`` comes from.
        product: part of the names of the products that the row is for; empty for all others.
    """

    since: tuple[int, int]
    small_m: int
    min_ops: float
    source: str
    product: str = ""


GEFORCE = "GeForce"
"""In the name of a consumer GPU. Those sum bfloat16 products in float32 at half rate, so that int8
is four times bfloat16 there and twice on the professional GPU with the same chip."""

# the model: a separate quantization pass, 2 to 2.5 us per launch, int8 at the rate of published
# kernels. Where int8 is twice bf16, the time that it saves must pay for the same pass, so the limit
# grows with the rate of bf16: 1e9 x (bf16 rate of the largest product / 312 TFLOPS of an A100).
# tcgen05 is the only fast path from 10.0 to 11.0, and these kernels have mma.sync alone.
ARCHS = (
    Arch((8, 0), 16, 1e9, "modelled for A100: 0.97x at 0.7 GFLOP, 1.18x at 2.7"),
    Arch((8, 6), 16, 0.5e9, "scaled from A100 for A10, A40 and A6000: int8 twice bf16"),
    Arch((8, 6), 16, 0, "modelled for RTX 3090: int8 four times bf16", GEFORCE),
    Arch((8, 9), 16, 1.2e9, "scaled from A100 for L40S; L4 has a third of its rate"),
    Arch((8, 9), 16, 0, "modelled for RTX 4090: 1.6x at 0.7 GFLOP", GEFORCE),
    Arch((9, 0), 16, 3e9, "modelled for H200: 0.91x at 2.7 GFLOP, 1.16x at 4.8"),
    # at best the rate of an A100 per multiprocessor and clock: half of cuBLAS bf16 on a B200
    Arch((10, 0), 16, math.inf, "int8 by mma.sync is about half as fast as bf16 by tcgen05"),
    # 0.15 POPS of int8 against 2.25 PFLOPS of bf16 in the vendor's table; between the 32 IMMA of
    # the loop of gemm_int8.cu nvcc 13.0 puts 110 NOP for sm_103, and none for sm_100 and sm_110
    Arch((10, 3), 16, math.inf, "hardly any int8 hardware: a fifteenth of the rate of bf16"),
    Arch((11, 0), 16, math.inf, "as 10.0: int8 by mma.sync, bf16 by tcgen05"),
    Arch((12, 0), 16, 1.6e9, "scaled from A100 for RTX PRO 6000: int8 twice bf16"),
    Arch((12, 0), 16, 0, "as 8.9: int8 four times bf16", GEFORCE),
)


def arch(capability: tuple[int, int], product: str = "") -> Arch:
    """The row of ``ARCHS`` for a GPU.

    Args:
        capability: compute capability, 8.0 or later.
        product: name of the GPU, as torch gives it.
    """
    rows = [row for row in ARCHS if row.since <= capability and row.product in product]
    return max(rows, key=lambda row: (row.since, bool(row.product)))


def choose(capability: tuple[int, int], m: int, n: int, k: int, product: str = "") -> str:
    """The path of a GPU for an input (M, K) and a weight (N, K).

    Args:
        capability: compute capability of the GPU, 8.0 or later.
        m: tokens.
        n: output channels.
        k: input channels.
        product: name of the GPU.

    Returns:
        ``small_m``, ``float`` or ``int8``.
    """
    row = arch(capability, product)
    return _choose(row.small_m, row.min_ops, m, n, k)


def path_for(x: Tensor, n: int) -> str:
    """The path for an input ``x`` (M, K) and N output channels; off the GPU always ``int8``."""
    if INT8_ONLY or not on_gpu(x) or x.dtype not in (torch.bfloat16, torch.float16):
        return "int8"
    small_m, min_ops = _limits(x.device.index or 0)
    return _choose(small_m, min_ops, x.shape[0], n, x.shape[1])


def _choose(small_m: int, min_ops: float, m: int, n: int, k: int) -> str:
    if m <= small_m:
        return "small_m"
    return "float" if 2 * m * n * k < min_ops else "int8"


def multiplies_fp4(x: Tensor, mx: bool) -> bool:
    """Whether ``x`` (M, K) is on a GPU that multiplies FP4 values, and its kernel supports K."""
    return on_gpu(x) and x.shape[1] % FP4_COLUMNS[mx] == 0 and _has_fp4(x.device.index or 0)


def explanation(
    capability: tuple[int, int], n: int, k: int, product: str = "", packed: bool = True
) -> str:
    """The choices of a GPU for one weight, in words.

    Args:
        capability: compute capability of the GPU, 8.0 or later.
        n: output channels.
        k: input channels.
        product: name of the GPU.
        packed: whether a kernel multiplies the packed weight; otherwise it is decoded once.
    """
    row = arch(capability, product)
    few = f"up to {row.small_m} tokens the packed weight times float, then " if packed else ""
    if row.min_ops == math.inf:
        return f"{few}decoded to float ({row.source})"
    first = math.ceil(row.min_ops / (2 * n * k))
    if packed and first <= row.small_m + 1:
        return f"{few}int8"
    return f"{few}decoded to float below {max(first, row.small_m + 1)} tokens, then int8"


def on_gpu(x: Tensor) -> bool:
    """Whether this module decides how ``x`` is multiplied."""
    return x.is_cuda


@graph_constant
def _has_fp4(index: int) -> bool:
    """Whether a GPU has FP4 products, and the library has the machine code for them."""
    if not torch.cuda.is_available() or not CUDA.load() or CUDA.opened is None:
        return False
    capability = torch.cuda.get_device_capability(index)
    archs = CUDA.opened.dtq_cuda_archs().decode().split()
    return capability[0] == 12 and not {"sm_120f", f"sm_{arch_of(capability)}"}.isdisjoint(archs)


@graph_constant
def _limits(index: int) -> tuple[int, float]:
    """``small_m`` and ``min_ops`` of a GPU; those of int8 at every size where it has no kernels."""
    # the torch reference decodes slowly
    if torch.cuda.is_available() and CUDA.load():
        capability = torch.cuda.get_device_capability(index)
        if capability >= OLDEST:
            row = arch(capability, torch.cuda.get_device_name(index))
            return row.small_m, row.min_ops
    return -1, 0.0
