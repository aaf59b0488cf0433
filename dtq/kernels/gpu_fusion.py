# SPDX-License-Identifier: Apache-2.0
"""``FUSIONS``: which patterns are fused on a GPU, by estimates of the fused kernel and of a pass.

Nothing is measured, and nothing is timed when a model runs. An estimate counts the cycles of one
multiprocessor for 1024 outputs. ``fused`` are the cycles that the pattern adds to the kernel it is
fused into: for an epilogue the difference of two walks of the machine code
(``tests/kernels/test_cuda_timing.py``, which compares the table with them). ``apart`` are those of
one more pass over memory, at the bandwidth of the GPU that is named: 4 bytes an output for GELU
(read, write), 6 for a gate with a residual. A kernel launch, about 2 us, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dtq.kernels import gpu_dispatch
from dtq.kernels.compile.cuda import OLDEST

PATTERNS = ("norm", "gelu", "gate")
"""LayerNorm, modulation and quantization; a GEMM and GELU; a GEMM, gate and residual."""


@dataclass(frozen=True)
class Fusion:
    """Estimates for GPUs from one compute capability up to that of the next row of the pattern.

    Attributes:
        pattern: of ``PATTERNS``.
        since: the lowest compute capability.
        fused: cycles that the fused kernel takes longer than without the pattern.
        apart: cycles of the pattern as a pass of its own.
        source: where the two numbers come from.
    """

    pattern: str
    since: tuple[int, int]
    fused: float
    apart: float
    source: str

    @property
    def is_faster(self) -> bool:
        """Whether the fused kernel is estimated faster."""
        return self.fused < self.apart


_WGMMA = "epilogue of wgmma 256x128, H200 with 20.7 bytes a cycle and multiprocessor"
_MMA = "epilogue of mma 128x128 for"

FUSIONS = (
    # one pass of 3 bytes a value, bound by its instructions, instead of two of 4 and 3 bytes
    Fusion("norm", (8, 0), 203, 346, "rows_register.cuh, H200: 25.4 instructions a value"),
    Fusion("gelu", (8, 0), 466, 312, f"{_MMA} sm_80, A100 with 13.1 bytes a cycle"),
    Fusion("gelu", (8, 9), 466, 1311, f"{_MMA} sm_89, RTX 4090 with 3.1 bytes a cycle"),
    Fusion("gelu", (9, 0), 86, 198, _WGMMA),
    Fusion("gelu", (10, 0), 466, 312, "as 8.0: mma.sync"),
    Fusion("gelu", (12, 0), 760, 934, f"{_MMA} sm_120f, RTX 5090 with 4.4 bytes a cycle"),
    Fusion("gate", (8, 0), 3182, 469, f"{_MMA} sm_80, A100"),
    Fusion("gate", (8, 9), 3182, 1976, f"{_MMA} sm_89, RTX 4090"),
    Fusion("gate", (9, 0), 54, 297, _WGMMA),
    Fusion("gate", (10, 0), 3182, 469, "as 8.0: mma.sync"),
)


def fusion(pattern: str, capability: tuple[int, int]) -> Fusion:
    """The row of ``FUSIONS`` for a pattern on a GPU of compute capability 8.0 or later."""
    rows = [row for row in FUSIONS if row.pattern == pattern and row.since <= capability]
    return max(rows, key=lambda row: row.since)


def is_fused(pattern: str, x: torch.Tensor) -> bool:
    """Whether a pattern is fused on the device of a tensor; off the GPU always."""
    return not gpu_dispatch.on_gpu(x) or _is_faster(pattern, x.device.index or 0)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_faster(pattern: str, index: int) -> bool:
    if not torch.cuda.is_available():
        return False
    capability = torch.cuda.get_device_capability(index)
    return capability >= OLDEST and fusion(pattern, capability).is_faster
