# SPDX-License-Identifier: Apache-2.0
"""What a number format is: five verbs and three laws.

A format num_rotations a float matrix (N, K) into named tensors, its *parts*, and back. The parts are the
parameters of the quantized layer and the keys of the file; nothing else is stored.

Laws, for every format ``f``, matrix ``x`` and ``p = f.compute_qparams(x)``:

1. ``f.unpack(f.pack(x, p))`` equals ``f.fake_quantize(x, p)`` bit for bit;
2. ``f.fake_quantize(f.fake_quantize(x, p), p)`` equals ``f.fake_quantize(x, p)``;
3. ``f.tensor_specs(x.shape)`` gives the exact names, shapes and dtypes of ``f.pack(x, p)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dtq.errors import InputError

QParams = dict[str, Tensor]
"""What ``compute_qparams`` learned, already rounded to the dtype that is stored. Column axes are groups."""

PackedTensors = dict[str, Tensor]
"""The stored tensors, by part name."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored part.

    Attributes:
        refuses: what is wrong with values of that dtype which no such part holds, None when nothing
            is. Kernels count on it, so files are asked when they are read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    unsupported_reason: Callable[[Tensor], str | None] | None = field(
        default=None, compare=False, repr=False
    )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Format(Protocol):
    """How numbers are kept. Stateless: everything learned is in ``Params``."""

    @property
    def name(self) -> str:
        """Grid, then granularity: ``int4-g64``."""

    @property
    def group(self) -> int | None:
        """Columns that share parameters; None when a whole row does."""

    @property
    def vector(self) -> int:
        """Columns coded together; ``fake_quantize`` and ``compute_qparams`` take slices of whole vectors."""

    @property
    def data_dependent(self) -> bool:
        """``compute_qparams`` learns its levels from data: it uses ``column_weights`` and ignores ``clip``."""

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """The parts that a matrix of this shape is stored as.

        Raises:
            InputError: the shape does not fit the format (K not a multiple of the group).
        """

    def compute_qparams(
        self,
        x: Tensor,
        column_weights: Tensor | None = None,
        *,
        clip: Tensor | float = 1.0,
        outer: QParams | None = None,
    ) -> QParams:
        """Learn the parameters of ``x`` (N, K).

        Args:
            x: float matrix (N, K), or a slice of whole groups of it.
            column_weights: weight of each column's squared error (K,), for formats that choose by
                error: learned levels, nvfp4-46. Others have no use for it.
            clip: share of the range to keep, a number, (N, 1) or (N, groups).
            outer: parameters of the whole matrix; those that belong to whole rows are taken from
                there and not learned again. Column solvers use it to fit one group.
        """

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        """Nearest representable values, as float; ``x`` holds columns ``cols`` of the matrix."""

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        """The stored tensors of ``snap(x, params)``."""

    def unpack(self, tensors: PackedTensors) -> Tensor:
        """The float32 matrix (N, K) that the parts stand for."""


_TOGETHER = 2**16  # weights whose copies on the way to a code stay in the cache


def fake_quantize_weight(fmt: Format, x: Tensor, qparams: QParams) -> Tensor:
    """``fmt.fake_quantize(x, params)`` of a large matrix, some rows at a time: several times as fast."""
    rows = max(1, _TOGETHER // max(1, x.shape[1]))
    if fmt.data_dependent or len(x) <= rows:  # parameters that are learned are not all of rows
        return fmt.fake_quantize(x, qparams)
    out = torch.empty_like(x, dtype=torch.float32)
    for first in range(0, len(x), rows):
        some = slice(first, first + rows)
        of_rows = {
            k: v[some] if v.ndim == 2 and len(v) == len(x) else v for k, v in qparams.items()
        }
        out[some] = fmt.fake_quantize(x[some], of_rows)
    return out


def bits_per_weight(fmt: Format, shape: tuple[int, int]) -> float:
    """Stored bits of every part, divided by the number of weights."""
    return 8 * sum(s.nbytes for s in fmt.tensor_specs(shape).values()) / math.prod(shape)


def groups_of(name: str, columns: int, group: int | None) -> int:
    """Parameter columns of a row.

    Raises:
        InputError: the columns are not whole groups.
    """
    if group is None:
        return 1
    if columns % group:
        raise InputError(
            f"{name} needs input features divisible by {group}, got {columns}. "
            f"Use int4-row or int8-row for this layer, or keep it."
        )
    return columns // group


def expand_groups(value: Tensor, columns: int, group: int | None, cols: slice | None) -> Tensor:
    """The parameter of each of ``columns`` weights: (N, groups) to (N, columns), or (N, 1)."""
    if group is None:
        return value
    start = cols.start or 0 if cols is not None else 0
    first, last = start // group, (start + columns - 1) // group
    if first == last:
        return value[:, first : first + 1]
    if start % group == 0 and columns % group == 0:
        return value[:, first : last + 1].unsqueeze(-1).expand(-1, -1, group).flatten(1)
    return value[:, torch.arange(start, start + columns, device=value.device) // group]


def in_groups(x: Tensor, group: int | None) -> Tensor:
    """View (N, K) as (N, K/group, group); a row is one group when ``group`` is None."""
    return x.unflatten(1, (-1, group if group is not None else x.shape[1]))


def scale_dtype(group: int | None) -> torch.dtype:
    """float32 for a scale per row; bfloat16 for one per group, of which there are many.

    Unlike float16 it has no smallest weight below which a scale becomes zero.
    """
    return torch.float32 if group is None else torch.bfloat16


def scaled(codes: Tensor, scale: Tensor, zero: Tensor | int | None = None) -> Tensor:
    """``(code - zero) * scale``, float32 (N, K); scale, and zero if it is a tensor, (N, groups)."""
    grouped = codes.float().unflatten(1, (scale.shape[1], -1))  # (N, groups, group)
    if zero is not None:
        grouped = grouped - (zero.float().unsqueeze(-1) if isinstance(zero, Tensor) else zero)
    return (grouped * scale.float().unsqueeze(-1)).flatten(1)


def divide(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale``, and 0 where the scale is 0: such a group holds zeros alone."""
    return x / torch.where(scale == 0, torch.inf, scale)


def broadcast_weights(x: Tensor, column_weights: Tensor | None) -> Tensor:
    """Weight of the squared error of each column (1, K); all alike when none is given, or all 0."""
    if column_weights is None or not column_weights.any():
        return x.new_ones((1, x.shape[1]), dtype=torch.float32)
    return column_weights.to(x.device, torch.float32).reshape(1, -1)
