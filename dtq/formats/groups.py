# SPDX-License-Identifier: Apache-2.0
"""One parameter per row, or per group of consecutive columns of a row: shapes and broadcasting.

``N`` is the number of rows (output channels, or tokens), ``K`` the number of columns (input
channels). A parameter has the shape (N, groups), with groups = K / group, or 1 per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.errors import InputError


def num_groups(name: str, columns: int, group: int | None) -> int:
    """Groups of a row of ``columns`` columns; 1 when ``group`` is None.

    Raises:
        InputError: ``columns`` is not a multiple of ``group``. The message starts with ``name``.
    """
    if group is None:
        return 1
    if columns % group:
        raise InputError(
            f"{name} needs input features divisible by {group}, got {columns}. "
            f"Use int4-row or int8-row for this layer, or exclude it."
        )
    return columns // group


def in_groups(x: Tensor, group: int | None) -> Tensor:
    """View (N, K) as (N, groups, group); the whole row is one group when ``group`` is None."""
    return x.unflatten(1, (-1, group if group is not None else x.shape[1]))


def expand_groups(
    value: Tensor, columns: int, group: int | None, cols: slice | None = None
) -> Tensor:
    """Repeat a parameter of groups for each column of a slice of the matrix.

    Args:
        value: parameter of the whole matrix (N, groups), any dtype.
        columns: width of the slice.
        group: columns per group; None: one value per row.
        cols: where the slice lies in the matrix; None: at the first column.

    Returns:
        (N, columns), or (N, 1) where one value serves every column of the slice.
    """
    if group is None:
        return value
    start = cols.start or 0 if cols is not None else 0
    first, last = start // group, (start + columns - 1) // group
    if first == last:
        return value[:, first : first + 1]
    if start % group == 0 and columns % group == 0:
        return value[:, first : last + 1].unsqueeze(-1).expand(-1, -1, group).flatten(1)
    return value[:, torch.arange(start, start + columns, device=value.device) // group]


def scale_dtype(group: int | None) -> torch.dtype:
    """float32 for one scale per row, bfloat16 for one per group, of which there are many.

    bfloat16 has the exponent range of float32: unlike in float16, no small scale becomes zero.
    """
    return torch.float32 if group is None else torch.bfloat16


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | int | None = None) -> Tensor:
    """``(q - zero_point) * scale`` as float32 (N, K).

    Args:
        q: quantized values (N, K), any dtype.
        scale: (N, groups); the number of groups follows from its shape.
        zero_point: a number, or (N, groups); None: 0.

    Returns:
        float32 (N, K).
    """
    grouped = q.float().unflatten(1, (scale.shape[1], -1))  # (N, groups, group)
    if zero_point is not None:
        grouped = grouped - (
            zero_point.float().unsqueeze(-1) if isinstance(zero_point, Tensor) else zero_point
        )
    return (grouped * scale.float().unsqueeze(-1)).flatten(1)


def divide(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale``, and 0 where the scale is 0: every weight of such a group is 0."""
    return x / torch.where(scale == 0, torch.inf, scale)


def broadcast_weights(x: Tensor, column_weights: Tensor | None) -> Tensor:
    """Weights of the squared error of each column, float32 (1, K) on the device of ``x`` (N, K).

    All ones when ``column_weights`` (K,) is None or all zero.
    """
    if column_weights is None or not column_weights.any():
        return x.new_ones((1, x.shape[1]), dtype=torch.float32)
    return column_weights.to(x.device, torch.float32).reshape(1, -1)
