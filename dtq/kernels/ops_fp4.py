# SPDX-License-Identifier: Apache-2.0
"""Ops of products whose operands are both FP4 with block scales: schema, reference, fake.

NVFP4 (an e4m3 scale for 16 columns, a float one for the token and for the matrix) and MXFP4 (a
power of two for 32), what the tensor cores of compute capability 12 multiply by themselves. Codes
are rounded as the activation formats ``nvfp4`` and ``mxfp4`` round. The products are exact, their
sums float32 in the order of the hardware, so devices agree to rounding and not to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.formats.floats import MxFp4, NvFp4
from dtq.formats.grid import E2M1
from dtq.formats.packing import packed_width, unpack_bits
from dtq.kernels.ops_gemm import (
    BRANCH_ARGS,
    EPILOGUE_ARGS,
    GEMM_ARGS,
    apply_epilogue,
    gemm_fake,
    with_branch,
)
from dtq.kernels.ops_quantize import TRANSFORM_ARGS, transform_input

_NV = NvFp4("nvfp4")
_MX = MxFp4("mxfp4")
_FLOOR = 1e-30  # of a token's largest magnitude


def _fp4_quantize_rows(
    x: Tensor,  # (M, K) any float dtype
    pre_scale: Tensor | None,  # (K,) bfloat16
    perm: Tensor | None,  # (K,) int32
    hadamard_block: int,
    num_rotations: int,
    mx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 (M, K/2), block scales (M, K/16) e4m3 or (M, K/32) uint8, token scales (M,).

    The token scale is NaN where something in the token is no finite number; its codes are any then.
    """
    x = transform_input(x.float(), pre_scale, perm, hadamard_block, num_rotations)
    peak = x.abs().amax(1)  # NaN if there is one
    if mx:
        parts = _MX.pack(x, _MX.compute_qparams(x))
        row = torch.where(peak.isfinite(), 1.0, torch.nan)
        return parts["weight"], parts["weight_scale"], row
    peak = peak.clamp(min=_FLOOR)
    one = _NV.compute_qparams(x.new_ones(1, x.shape[1]))
    unit = x / peak.unsqueeze(1)
    parts = _NV.pack(unit, _NV.compute_qparams(unit, outer=one))
    row = torch.where(peak.isfinite(), one["weight_scale_2"].reshape(()) * peak, torch.nan)
    return parts["weight"], parts["weight_scale"], row


def _fp4_linear(
    x_q: Tensor,  # (M, K/2) int8, two E2M1 codes a byte
    row_scale: Tensor,  # (M,) float32
    weight: Tensor,  # (N, K/2)
    weight_scale: Tensor,  # (N, K/16) float8_e4m3fn, or (N, K/32) uint8
    x_block_scale: Tensor,  # (M, K/16) or (M, K/32) of the same
    weight_scale_2: Tensor | None,  # (1, 1) float32
    bias: Tensor | None,
    gelu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    y = _decoded(x_q, x_block_scale) @ _decoded(weight, weight_scale).T
    y = y * row_scale.unsqueeze(1)
    if weight_scale_2 is not None:
        y = y * weight_scale_2.reshape(())
    if bias is not None:
        y = y + bias.float()
    return apply_epilogue(with_branch(y, low, up), gelu, gate, residual, dtype)  # (M, N)


def _decoded(codes: Tensor, scale: Tensor) -> Tensor:
    levels = E2M1.decode(unpack_bits(codes, 4)).unflatten(1, (scale.shape[1], -1))
    if scale.dtype == torch.uint8:
        powers = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
        return (levels * powers.unsqueeze(-1)).flatten(1)
    return (levels * scale.float().unsqueeze(-1)).flatten(1)


def _codes_like(x: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    mx = rest[-1]
    blocks, dtype = (columns // 32, torch.uint8) if mx else (columns // 16, torch.float8_e4m3fn)
    return (
        x.new_empty((rows, packed_width("fp4", columns, 4)), dtype=torch.int8),
        x.new_empty((rows, blocks), dtype=dtype),
        x.new_empty((rows,), dtype=torch.float32),
    )


OPS = (
    (
        f"fp4_quantize_rows(Tensor x, {TRANSFORM_ARGS}, bool mx) -> (Tensor, Tensor, Tensor)",
        _fp4_quantize_rows,
        _codes_like,
    ),
    (
        f"fp4_linear({GEMM_ARGS}, Tensor x_block_scale, Tensor? weight_scale_2, {EPILOGUE_ARGS}, {BRANCH_ARGS})"
        " -> Tensor",
        _fp4_linear,
        gemm_fake,
    ),
)
"""Schema, reference and fake, as rows of the table in ``ops.py``."""
