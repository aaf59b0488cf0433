# SPDX-License-Identifier: Apache-2.0
"""Ops that multiply FP4 activations and weights with block scales: references and fakes.

NVFP4 has an e4m3 scale per 16 columns and a float scale per token and for the weight. MXFP4 has a
power of two per 32 columns. The tensor cores of compute capability 12 multiply both. Activations
are rounded as by the activation formats ``nvfp4`` and ``mxfp4``. The products are exact; their sums
are float32 in the order of the hardware, so devices agree up to rounding, not bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtq.formats.floats import MxFp4, NvFp4
from dtq.formats.grid import E2M1
from dtq.formats.packing import packed_width, unpack_bits
from dtq.kernels.ops_gemm import EPILOGUE_ARGS, GEMM_ARGS, apply_epilogue, gemm_fake
from dtq.kernels.ops_quantize import TRANSFORM_ARGS, transform_input

_NV = NvFp4("nvfp4")
_MX = MxFp4("mxfp4")
_MIN_AMAX = 1e-30  # of a token


def _fp4_quantize_rows(
    x: Tensor,  # (M, K) any float dtype
    pre_scale: Tensor | None,  # (K,) bfloat16
    perm: Tensor | None,  # (K,) int32
    hadamard_block: int,
    num_rotations: int,
    mx: bool,  # whether the format is MXFP4
) -> tuple[Tensor, Tensor, Tensor]:
    """E2M1 codes (M, K/2), block scales (M, K/16) e4m3 or (M, K/32) uint8, token scales (M,).

    The token scale is NaN where a value of the token is not finite; its codes are arbitrary then.
    """
    x = transform_input(x.float(), pre_scale, perm, hadamard_block, num_rotations)
    amax = x.abs().amax(1).clamp(min=_MIN_AMAX)  # NaN if there is one
    if mx:
        tensors, row_scale = _MX.pack(x, _MX.compute_qparams(x)), torch.ones_like(amax)
    else:
        one = _NV.compute_qparams(x.new_ones(1, x.shape[1]))
        unit = x / amax.unsqueeze(1)
        tensors = _NV.pack(unit, _NV.compute_qparams(unit, outer=one))
        row_scale = one["weight_scale_2"].reshape(()) * amax
    row_scale = torch.where(amax.isfinite(), row_scale, torch.nan)
    return tensors["weight"], tensors["weight_scale"], row_scale


def _fp4_linear(
    x_q: Tensor,  # (M, K/2) int8, two E2M1 codes a byte
    row_scale: Tensor,  # (M,) float32
    weight: Tensor,  # (N, K/2)
    weight_scale: Tensor,  # (N, K/16) float8_e4m3fn, or (N, K/32) uint8
    x_block_scale: Tensor,  # (M, K/16) or (M, K/32) of the same
    weight_scale_2: Tensor | None,  # (1, 1) float32
    *epilogue: Any,  # of apply_epilogue
) -> Tensor:
    y = _decoded(x_q, x_block_scale) @ _decoded(weight, weight_scale).T
    y = y * row_scale.unsqueeze(1)
    if weight_scale_2 is not None:
        y = y * weight_scale_2.reshape(())
    return apply_epilogue(y, *epilogue)  # (M, N)


def _decoded(codes: Tensor, scale: Tensor) -> Tensor:
    values = E2M1.decode(unpack_bits(codes, 4)).unflatten(1, (scale.shape[1], -1))
    if scale.dtype == torch.uint8:  # the exponent of a power of two
        scale = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    return (values * scale.float().unsqueeze(-1)).flatten(1)


def _fp4_fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    mx = rest[-1]
    blocks, dtype = (columns // 32, torch.uint8) if mx else (columns // 16, torch.float8_e4m3fn)
    return (
        x.new_empty((rows, packed_width("fp4", columns, 4)), dtype=torch.int8),
        x.new_empty((rows, blocks), dtype=dtype),
        x.new_empty((rows,), dtype=torch.float32),
    )


_QUANTIZE = f"Tensor x, {TRANSFORM_ARGS}, bool mx) -> (Tensor, Tensor, Tensor)"
_SCALES = "Tensor x_block_scale, Tensor? weight_scale_2"

OPS = (
    (f"fp4_quantize_rows({_QUANTIZE}", _fp4_quantize_rows, _fp4_fake),
    (f"fp4_linear({GEMM_ARGS}, {_SCALES}, {EPILOGUE_ARGS}", _fp4_linear, gemm_fake),
)
"""Schema, reference and fake of each op; rows of the table in ``ops.py``."""
