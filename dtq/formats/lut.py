# SPDX-License-Identifier: Apache-2.0
"""Learned levels: a look-up table per layer, a scale per row or group.

How the levels are found is a function ``(moments, bits) -> levels``: :func:`lloyd` here, the
twin-log families in ``twinlog.py``. It sees the weights scaled to [-1, 1] through
:class:`Moments`, which judges any set of levels with a few look-ups instead of a pass over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.formats.base import (
    PackedTensors,
    QParams,
    TensorSpec,
    broadcast_weights,
    divide,
    expand_groups,
    groups_of,
    in_groups,
    scale_dtype,
    scaled,
)
from dtq.formats.packing import pack_bits, packed_width, unpack_bits

SAMPLE = 2**20
"""Weights that the levels of a layer are learned from, in whole rows."""

UNITS = 2**7
"""Levels of the 4-bit formats with a scale per row are multiples of 1/UNITS, int8."""

_FINE = 2**15  # of the others: equal or well apart, so that snapping settles
_SHARES = (1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


class CodebookMoments:
    """Sorted weights with running sums of ``weight * x^p``, p = 0, 1, 2, in float64."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x, order = x.double().sort()
        weight = weight.double()[order]
        self.sums = [
            torch.cat([weight.new_zeros(1), (weight * self.x**p).cumsum(0)]) for p in range(3)
        ]

    def cells(self, levels: Tensor) -> list[Tensor]:
        """The three sums over what is nearest to each of the rising levels (..., L)."""
        inner = torch.searchsorted(self.x, (levels[..., 1:] + levels[..., :-1]) / 2)
        first = torch.zeros_like(inner[..., :1])
        ends = torch.cat([first, inner, first + len(self.x)], -1)
        return [s[ends].diff(dim=-1) for s in self.sums]

    def error(self, levels: Tensor) -> Tensor:
        """Weighted squared error of rounding to the nearest of the levels (..., L)."""
        mass, mean, square = self.cells(levels)
        return (square - 2 * levels * mean + levels.square() * mass).sum(-1)


Find = Callable[[CodebookMoments, int], Tensor]


def lloyd(moments: CodebookMoments, bits: int, steps: int = 100) -> Tensor:
    """Levels that are the means of their cells (Lloyd 1957/1982; Max 1960), from quantiles."""
    mass = moments.sums[0]
    share = (torch.arange(2**bits, device=mass.device, dtype=mass.dtype) + 0.5) / 2**bits
    start = torch.searchsorted(mass, share * mass[-1]).clamp(1, len(moments.x)) - 1
    levels = moments.x[start]
    for _ in range(steps):
        mass, mean, _ = moments.cells(levels)
        levels = torch.where(mass > 0, mean / mass, levels)
    return levels


@dataclass(frozen=True)
class Lut:
    """``w = lut[code] * scale``; row scales are float32, group scales bfloat16.

    ``compute_qparams`` finds the levels once for the matrix, on weights over their row's or group's largest
    magnitude; then the scale of each row or group, by error over a few shares of that magnitude
    and a least-squares step. Errors are weighted with the column_weights.
    """

    name: str
    bits: int
    find: Find
    group: int | None = None

    vector = 1
    data_dependent = True

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = groups_of(self.name, columns, self.group)
        return {
            "weight": TensorSpec((rows, packed_width(self.name, columns, self.bits)), torch.int8),
            "weight_scale": TensorSpec((rows, groups), scale_dtype(self.group)),
            "weight_lut": TensorSpec((1, 2**self.bits), torch.float32, self._refuses()),
        }

    @property
    def integers(self) -> bool:
        """Levels are int8 over ``UNITS``: products with int8 codes are exact in int32."""
        return self.bits == 4 and self.group is None

    def _refuses(self) -> Callable[[Tensor], str | None] | None:
        return _no_integers if self.integers else None

    def compute_qparams(
        self,
        x: Tensor,
        column_weights: Tensor | None = None,
        *,
        clip: Tensor | float = 1.0,
        outer: QParams | None = None,
    ) -> QParams:
        if outer is not None and self.group is None:
            return outer
        grouped = in_groups(x.float(), self.group)  # (N, groups, group)
        weight = in_groups(broadcast_weights(x, column_weights), self.group)  # (1, groups, group)
        lut = self._levels(grouped, weight) if outer is None else outer["weight_lut"]
        return {"weight_scale": self._scale(grouped, weight, lut), "weight_lut": lut}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        scale = expand_groups(qparams["weight_scale"], x.shape[1], self.group, cols).float()
        lut = qparams["weight_lut"].reshape(-1)
        return lut[_nearest(divide(x.float(), scale), lut)] * scale

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        scale = expand_groups(qparams["weight_scale"], x.shape[1], self.group, None).float()
        codes = _nearest(divide(x.float(), scale), qparams["weight_lut"].reshape(-1))
        return {"weight": pack_bits(codes, self.bits), **qparams}

    def unpack(self, tensors: PackedTensors) -> Tensor:
        codes = unpack_bits(tensors["weight"], self.bits).int()
        levels = tensors["weight_lut"].float().reshape(-1)[codes]
        return scaled(levels, tensors["weight_scale"])

    def _levels(self, grouped: Tensor, weight: Tensor) -> Tensor:
        """The look-up table (1, 2^bits), rising."""
        every = -(-grouped.numel() // SAMPLE)
        some = grouped[::every]
        peak = some.abs().amax(-1, keepdim=True)
        moments = CodebookMoments(divide(some, peak).flatten(), (weight * peak.square()).flatten())
        levels = self.find(moments, self.bits).reshape(1, -1)
        rounded = (
            _integers(levels, moments) if self.integers else torch.round(levels * _FINE) / _FINE
        )
        return rounded.float() + 0.0  # no -0

    def _scale(self, grouped: Tensor, weight: Tensor, lut: Tensor) -> Tensor:
        """Scale of each row or group (N, groups), as stored."""
        lut = lut.reshape(-1)
        peak = grouped.abs().amax(-1, keepdim=True)

        def w_q(scale: Tensor) -> Tensor:
            return lut[_nearest(divide(grouped, scale), lut)]

        errors = []
        for share in _SHARES:
            scale = share * peak
            errors.append(((w_q(scale) * scale - grouped).square() * weight).sum(-1, True))
        scale = torch.tensor(_SHARES).to(peak)[torch.stack(errors).argmin(0)] * peak
        level = w_q(scale)
        along, norm = ((weight * level * v).sum(-1, True) for v in (grouped, level))
        return torch.where(norm > 0, along / norm, scale).squeeze(-1).to(scale_dtype(self.group))


def _integers(levels: Tensor, moments: CodebookMoments) -> Tensor:
    """Levels (1, L) stretched to int8 over ``UNITS``; the scale makes up for the change of size.

    Where both signs have the same levels, each goes up or down, whatever errs least in all.
    """
    top = levels.abs().amax().clamp(min=1e-30)  # of a matrix of zeros
    units = levels / top * (UNITS - 1)
    best = torch.round(units)
    half = units[0, units.shape[1] // 2 :]
    if torch.equal(units[0], torch.cat([-half.flip(0), half])):
        ups = torch.arange(2 ** len(half), device=units.device).unsqueeze(1)
        up = (ups >> torch.arange(len(half), device=units.device) & 1) * (half != half.floor())
        magnitude = half.floor() + up
        tries = torch.cat([-magnitude.flip(1), magnitude], 1)
        best = tries[moments.error(tries * (top / (UNITS - 1))).argmin()].unsqueeze(0)
    return best / UNITS


def _no_integers(weight_lut: Tensor) -> str | None:
    units = weight_lut.float() * UNITS
    wrong = int(((units != units.round()) | (units.abs() > UNITS - 1)).sum())
    return f"{wrong} levels that are no int8 over {UNITS}" if wrong else None


def _nearest(u: Tensor, lut: Tensor) -> Tensor:
    """Index of the nearest of the rising levels; a tie goes down."""
    return torch.bucketize(u, (lut[1:] + lut[:-1]) / 2, out_int32=True)
