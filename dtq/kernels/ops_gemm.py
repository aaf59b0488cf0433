# SPDX-License-Identifier: Apache-2.0
"""Ops that multiply int8 activations: references and fakes of integer GEMMs.

Products are exact int32. A reference multiplies an int8 weight, expanded from the packed one, and
applies the epilogue in float32, in this order: ``float(acc) * row_scale * weight_scale``, bias, a
low-rank branch ``low @ up.T``, GELU (:func:`dtq.kernels.ops_quantize.gelu`), ``gate * y +
residual``, one cast. With a scale per group the first step is
``(float(acc_0) * scale_0 + float(acc_1) * scale_1 + ...) * row_scale``. All but the branch, whose
float products may be summed in any order, is the same on every device bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtq.formats.integer import TwoLevelInt
from dtq.formats.packing import unpack_bits
from dtq.kernels import ops_quantize


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 (M, N) of int8 (M, K) and (N, K)."""
    rows, columns = a.shape
    if columns == 1:  # torch._int_mm returns memory that it has not written
        return a.int() * b.int().T
    if a.is_cuda:  # torch._int_mm wants more than 16 rows and multiples of 8 there
        if rows > 16 and columns % 8 == 0 and len(b) % 8 == 0:
            return torch._int_mm(a, b.T)
        return (a.double() @ b.double().T).to(torch.int32)
    return torch._int_mm(a, b.T)


def expand_table(weight: Tensor, tables: Tensor) -> Tensor:
    """The int8 weight (N, K) of indices (N, K/2), two a byte, into int8 tables (N, groups, 16)."""
    index = unpack_bits(weight, 4).long().unflatten(1, (tables.shape[1], -1))
    return tables.gather(2, index).flatten(1)


def apply_epilogue(
    y: Tensor,
    bias: Tensor | None,
    gelu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """What follows a product, in float32: bias, low-rank branch, GELU, gate and residual, a cast.

    Args:
        y: float32 (M, N).
        bias: (N,), any float dtype.
        gelu: whether to apply GELU, tanh form.
        gate: (B, N), where B images divide M: row r takes ``r // (M / B)``; with a residual.
        residual: (M, N), with a gate.
        dtype: of the result.
        low: (M, R), bfloat16 or float16, the input times the first factor of the branch; with up.
        up: (N, R), the second factor, of the same dtype.

    Returns:
        (M, N) in ``dtype``.

    Raises:
        ValueError: a gate without a residual, one factor without the other, or the other way round.
    """
    if (low is None) != (up is None):
        raise ValueError("a low-rank branch has two factors")
    if (gate is None) != (residual is None):
        raise ValueError("a gate comes with a residual")
    if bias is not None:
        y = y + bias.float()
    if low is not None and up is not None:
        y = y + low.float() @ up.float().T
    if gelu:
        y = ops_quantize.gelu(y)
    if gate is not None and residual is not None:
        y = gate.float().repeat_interleave(len(y) // len(gate), 0) * y + residual.float()
    return y.to(dtype)


def _w8a8_epilogue_linear(
    x_q: Tensor,  # (M, K) int8
    row_scale: Tensor,  # (M,)
    weight: Tensor,  # (N, K) int8
    weight_scale: Tensor,  # (N, 1)
    *epilogue: Any,  # of apply_epilogue
) -> Tensor:
    y = int_matmul(x_q, weight).float() * row_scale.unsqueeze(1) * weight_scale.T
    return apply_epilogue(y, *epilogue)  # (M, N)


def _w8a8_linear(
    x_q: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,  # (N,) any float dtype
    dtype: torch.dtype,
) -> Tensor:
    args = x_q, row_scale, weight, weight_scale, bias
    return _w8a8_epilogue_linear(*args, False, None, None, dtype)


def _expanded(
    linear: Callable[..., Tensor],  # one of the two above
    expand: Callable[[Tensor, Tensor], Tensor],
    x_q: Tensor,
    row_scale: Tensor,
    weight: Tensor,  # (N, K/2) int8, two codes a byte; or (N, 3K/8) int8, eight in three bytes
    weight_scale: Tensor,
    groups: Tensor,  # weight_scale_2 (N, K/group) int8, scale2 - 1 and zero; or tables
    *epilogue: Any,
) -> Tensor:
    return linear(x_q, row_scale, expand(weight, groups), weight_scale, *epilogue)


def _group_a8_linear(
    x_q: Tensor,
    row_scale: Tensor,
    weight: Tensor,  # (N, K) or (N, K/2) int8
    weight_scale: Tensor,  # (N, groups) float32 or bfloat16
    weight_zero_point: Tensor | None,  # (N, groups) int8
    bits: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    weight_q, zero = (unpack_bits(weight, 4).view(torch.int8), 8) if bits == 4 else (weight, 0)
    groups = weight_scale.shape[1]
    x, w = x_q.tensor_split(groups, 1), weight_q.tensor_split(groups, 1)
    y = x_q.new_zeros((len(x_q), len(weight)), dtype=torch.float32)
    for i in range(groups):  # exact sums, then float32, the first group first
        zeros = zero if weight_zero_point is None else weight_zero_point[:, i].int()
        acc = int_matmul(x[i].contiguous(), w[i].contiguous())
        acc = acc - x[i].sum(1, keepdim=True, dtype=torch.int32) * zeros
        scaled = acc.float() * weight_scale[:, i].float()
        y = y + scaled if i else scaled
    return apply_epilogue(y * row_scale.unsqueeze(1), bias, False, None, None, dtype)


def gemm_fake(x_q: Tensor, row_scale: Tensor, weight: Tensor, *rest: object) -> Tensor:
    """Empty (M, N) of the dtype among the arguments."""
    dtype = next(value for value in rest if isinstance(value, torch.dtype))
    return x_q.new_empty((x_q.shape[0], weight.shape[0]), dtype=dtype)


GEMM_ARGS = "Tensor x_q, Tensor row_scale, Tensor weight, Tensor weight_scale"
"""Part of schemas: the operands of every product."""
EPILOGUE_ARGS = (
    "Tensor? bias, bool gelu, Tensor? gate, Tensor? residual, ScalarType dtype,"
    " Tensor? low=None, Tensor? up=None) -> Tensor"
)
"""End of schemas: what :func:`apply_epilogue` takes."""

_BIAS = "Tensor? bias, ScalarType dtype) -> Tensor"
_GROUPS = "Tensor weight_scale_2"
_ZERO = "Tensor? weight_zero_point, int bits"
_W3A8 = partial(_expanded, _w8a8_linear, partial(TwoLevelInt.expand, bits=3))
_W4A8 = partial(_expanded, _w8a8_linear, TwoLevelInt.expand)
_W4A8_EPILOGUE = partial(_expanded, _w8a8_epilogue_linear, TwoLevelInt.expand)
_LUT4A8 = partial(_expanded, _w8a8_linear, expand_table)

OPS = (
    (f"w8a8_linear({GEMM_ARGS}, {_BIAS}", _w8a8_linear, gemm_fake),
    (f"w4a8_linear({GEMM_ARGS}, {_GROUPS}, {_BIAS}", _W4A8, gemm_fake),
    (f"w3a8_linear({GEMM_ARGS}, {_GROUPS}, {_BIAS}", _W3A8, gemm_fake),
    (f"lut4a8_linear({GEMM_ARGS}, Tensor tables, {_BIAS}", _LUT4A8, gemm_fake),
    (f"group_a8_linear({GEMM_ARGS}, {_ZERO}, {_BIAS}", _group_a8_linear, gemm_fake),
    (f"w8a8_epilogue_linear({GEMM_ARGS}, {EPILOGUE_ARGS}", _w8a8_epilogue_linear, gemm_fake),
    (f"w4a8_epilogue_linear({GEMM_ARGS}, {_GROUPS}, {EPILOGUE_ARGS}", _W4A8_EPILOGUE, gemm_fake),
)
"""Schema, reference and fake of each op; rows of the table in ``ops.py``."""
