# SPDX-License-Identifier: Apache-2.0
"""``FUSIONS``: which patterns are fused on a GPU, by estimates of the fused kernel and of a pass.

Nothing is measured, and nothing is timed when a model runs. An estimate counts cycles for 1024
outputs. For an epilogue, ``fused`` are the cycles that the pattern adds to the kernel it is fused
into: the difference of one warp's walks of the machine code, not less than the special functions
need (``tests/kernels/test_cuda_timing.py`` compares the table with them). ``apart`` are those of
one more pass over memory, at the bandwidth of the GPU that is named: 4 bytes an output for GELU
(read, write), 6 for a gate with a residual. For LayerNorm they are the whole fused pass and the two
passes that it replaces. A kernel launch, about 2 us, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dtq.kernels import gpu_dispatch
from dtq.kernels.compile.cuda import OLDEST
from dtq.kernels.graph_constant import graph_constant

PATTERNS = ("norm", "gelu", "gate")
"""LayerNorm, modulation and quantization; a GEMM and GELU; a GEMM, gate and residual."""


@dataclass(frozen=True)
class Fusion:
    """Estimates for GPUs from one compute capability up to that of the next row of the pattern.

    Attributes:
        pattern: of ``PATTERNS``.
        since: the lowest compute capability.
        fused: cycles that the fused kernel takes longer than without the pattern; for ``norm`` all
            cycles of the fused pass.
        apart: cycles of the pattern as a pass of its own; for ``norm`` of the two passes.
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
_MMA = "epilogue of mma 128x128 for sm_80, A100 with 13.1 bytes a cycle; later GPUs have fewer"
_MMA_B200 = "epilogue of mma 128x128 for sm_80, B200 with 29 bytes a cycle"

FUSIONS = (
    # one pass of 3 bytes a value, bound by its instructions, instead of two of 4 and 3 bytes
    Fusion("norm", (8, 0), 203, 346, "rows_register.cuh, H200: 25.4 instructions a value"),
    Fusion("gelu", (8, 0), 56, 312, _MMA),
    Fusion("gelu", (9, 0), 92, 198, _WGMMA),
    Fusion("gelu", (10, 0), 56, 141, _MMA_B200),
    Fusion("gate", (8, 0), 59, 469, _MMA),
    Fusion("gate", (9, 0), 54, 297, _WGMMA),
    Fusion("gate", (10, 0), 59, 212, _MMA_B200),
)


def fusion(pattern: str, capability: tuple[int, int]) -> Fusion:
    """The row of ``FUSIONS`` for a pattern on a GPU of compute capability 8.0 or later."""
    rows = [row for row in FUSIONS if row.pattern == pattern and row.since <= capability]
    return max(rows, key=lambda row: row.since)


def is_fused(pattern: str, x: torch.Tensor) -> bool:
    """Whether a pattern is fused on the device of a tensor; off the GPU always."""
    return not gpu_dispatch.on_gpu(x) or _is_faster(pattern, x.device.index or 0)


@graph_constant
def _is_faster(pattern: str, index: int) -> bool:
    if not torch.cuda.is_available():
        return False
    capability = torch.cuda.get_device_capability(index)
    return capability >= OLDEST and fusion(pattern, capability).is_faster
