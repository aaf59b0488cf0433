# SPDX-License-Identifier: Apache-2.0
"""Ops that do more after the product of codes: schema, reference and fake, as in ``ops.py``.

After the bias, in float32 and in this order: a low-rank branch ``low @ up.T``, GELU (that of
:func:`dtq.kernels.fused.gelu`), ``gate * y + residual``, one cast. All but the branch, whose float
products may be summed in any order, is the same on every device bit for bit. And the product with
codes into int8 tables as weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.formats.packing import unpack_bits
from dtq.kernels.ops_quantize import gelu as gelu_of

_reference = torch.ops.dtq_reference


def _w8a8_epilogue_linear(
    x_q: Tensor,  # (M, K) int8
    row_scale: Tensor,  # (M,)
    weight: Tensor,  # (N, K) int8
    weight_scale: Tensor,  # (N, 1)
    bias: Tensor | None,  # (N,) any float dtype
    gelu: bool,
    gate: Tensor | None,  # (B, N) of dtype, B divides M: row r takes r // (M / B)
    residual: Tensor | None,  # (M, N) of dtype, with a gate
    dtype: torch.dtype,
    low: Tensor | None = None,  # (M, R) bfloat16 or float16
    up: Tensor | None = None,  # (N, R) of the same
) -> Tensor:
    y = _reference.w8a8_linear(x_q, row_scale, weight, weight_scale, bias, torch.float32)
    return apply_epilogue(with_branch(y, low, up), gelu, gate, residual, dtype)  # (M, N)


def _w4a8_epilogue_linear(
    x_q: Tensor,
    row_scale: Tensor,
    weight: Tensor,  # (N, K/2) int8, two codes a byte
    weight_scale: Tensor,
    weight_scale_2: Tensor,  # (N, K/group) int8, scale2 - 1 and zero
    bias: Tensor | None,
    gelu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    given = x_q, row_scale, weight, weight_scale, weight_scale_2, bias
    y = with_branch(_reference.w4a8_linear(*given, torch.float32), low, up)
    return apply_epilogue(y, gelu, gate, residual, dtype)


def _lut4a8_linear(
    x_q: Tensor,
    row_scale: Tensor,
    weight: Tensor,  # (N, K/2) int8, two codes a byte
    weight_scale: Tensor,
    tables: Tensor,  # (N, groups, 16) int8, what a code of a group stands for
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    expanded = by_table(weight, tables)
    y: Tensor = _reference.w8a8_linear(x_q, row_scale, expanded, weight_scale, bias, dtype)
    return y


def by_table(weight: Tensor, tables: Tensor) -> Tensor:
    """The int8 (N, K) that codes (N, K/2), two a byte, name in tables (N, groups, 16)."""
    index = unpack_bits(weight, 4).long().unflatten(1, (tables.shape[1], -1))
    return tables.gather(2, index).flatten(1)


def with_branch(y: Tensor, low: Tensor | None, up: Tensor | None) -> Tensor:
    """``y + low @ up.T`` of float32 (M, N), (M, R) and (N, R); ``y`` if there is no branch.

    Raises:
        ValueError: one factor without the other.
    """
    if (low is None) != (up is None):
        raise ValueError("a low-rank branch has two factors")
    return y if low is None or up is None else y + low.float() @ up.float().T


def apply_epilogue(
    y: Tensor, gelu: bool, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What follows the bias, on float32 (M, N).

    Raises:
        ValueError: a gate without a residual, or the other way round.
    """
    if (gate is None) != (residual is None):
        raise ValueError("a gate comes with a residual")
    if gelu:
        y = gelu_of(y)
    if gate is not None and residual is not None:
        y = gate.float().repeat_interleave(len(y) // len(gate), 0) * y + residual.float()
    return y.to(dtype)


def gemm_fake(x_q: Tensor, row_scale: Tensor, weight: Tensor, *rest: object) -> Tensor:
    """Empty (M, N) of the dtype among the arguments, for fakes."""
    dtype = next(given for given in rest if isinstance(given, torch.dtype))
    return x_q.new_empty((x_q.shape[0], weight.shape[0]), dtype=dtype)


GEMM_ARGS = "Tensor x_q, Tensor row_scale, Tensor weight, Tensor weight_scale"
EPILOGUE_ARGS = "Tensor? bias, bool gelu, Tensor? gate, Tensor? residual, ScalarType dtype"
BRANCH_ARGS = "Tensor? low=None, Tensor? up=None"
"""Parts of schemas: what every product begins with, what follows it, and its low-rank branch."""

OPS = (
    (
        f"w8a8_epilogue_linear({GEMM_ARGS}, {EPILOGUE_ARGS}, {BRANCH_ARGS}) -> Tensor",
        _w8a8_epilogue_linear,
        gemm_fake,
    ),
    (
        f"w4a8_epilogue_linear({GEMM_ARGS}, Tensor weight_scale_2, {EPILOGUE_ARGS}, {BRANCH_ARGS}) -> Tensor",
        _w4a8_epilogue_linear,
        gemm_fake,
    ),
    (
        f"lut4a8_linear({GEMM_ARGS}, Tensor tables, Tensor? bias, ScalarType dtype) -> Tensor",
        _lut4a8_linear,
        gemm_fake,
    ),
)
"""Schema, reference and fake, as rows of the table in ``ops.py``."""
