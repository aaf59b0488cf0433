# SPDX-License-Identifier: Apache-2.0
"""Learned codebooks: a look-up table per layer, a scale per row or group.

A codebook is learned by a function ``(moments, bits) -> entries``: :func:`lloyd` here, the twin-log
families in ``twinlog.py``. The function sees the weights scaled to [-1, 1], through
:class:`CodebookMoments`, which gives the error of any codebook with a few look-ups instead of a
pass over the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.formats.base import Clip, CodebookFormat, QParams, TensorSpec
from dtq.formats.groups import broadcast_weights, divide, in_groups, scale_dtype

SAMPLE = 2**20
"""Number of weights that the codebook of a layer is learned from, in whole rows."""

UNITS = 2**7
"""Entries of the 4-bit formats with a scale per row are multiples of 1 / UNITS, int8."""

_FINE = 2**15  # entries of the others are multiples of 1 / _FINE: equal, or clearly apart
_SCALE_FRACTIONS = (1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the amax


class CodebookMoments:
    """Sorted numbers with running sums of ``weight * x^p``, p = 0, 1, 2, in float64.

    Args:
        x: the numbers (S,).
        weight: weight of the squared error of each (S,).
        rising: they are sorted already.
    """

    def __init__(self, x: Tensor, weight: Tensor, rising: bool = False) -> None:
        self.x, weight = x.double(), weight.double()
        if not rising:
            self.x, order = self.x.sort()
            weight = weight[order]
        zero = weight.new_zeros(1)
        self.sums = [torch.cat([zero, (weight * self.x**p).cumsum(0)]) for p in range(3)]

    def cells(self, entries: Tensor) -> list[Tensor]:
        """The three sums over the numbers that are nearest to each rising entry: 3 x (..., L)."""
        inner = torch.searchsorted(self.x, (entries[..., 1:] + entries[..., :-1]) / 2)
        first = torch.zeros_like(inner[..., :1])
        ends = torch.cat([first, inner, first + len(self.x)], -1)
        return [s[ends].diff(dim=-1) for s in self.sums]

    def error(self, entries: Tensor) -> Tensor:
        """Weighted squared error (...) of rounding to the nearest of the entries (..., L)."""
        mass, mean, square = self.cells(entries)
        return (square - 2 * entries * mean + entries.square() * mass).sum(-1)


LearnCodebook = Callable[[CodebookMoments, int], Tensor]
"""``(moments, bits)`` to rising entries, float64 (2^bits,)."""


def lloyd(moments: CodebookMoments, bits: int, steps: int = 100) -> Tensor:
    """Entries that are the means of their cells (Lloyd 1957/1982; Max 1960), from quantiles."""
    mass = moments.sums[0]
    quantiles = (torch.arange(2**bits, device=mass.device, dtype=mass.dtype) + 0.5) / 2**bits
    start = torch.searchsorted(mass, quantiles * mass[-1]).clamp(1, len(moments.x)) - 1
    entries = moments.x[start]
    for _ in range(steps):
        mass, mean, _ = moments.cells(entries)
        entries = torch.where(mass > 0, mean / mass, entries)
    return entries


@dataclass(frozen=True)
class Lut(CodebookFormat):
    """``w = lut[code] * scale`` with a learned table.

    ``compute_qparams`` learns the table once per matrix, from the weights divided by the largest
    magnitude of their row or group. It then chooses the scale of each row or group: the fraction of
    that magnitude with the lowest error, refined by a least-squares step. Squared errors are
    weighted with ``column_weights``.

    Attributes:
        name: key of ``FORMATS``.
        bits: bits of a code.
        learn: the function that learns the codebook.
        group: columns per scale; None: one float32 scale per row. Scales of groups are bfloat16.
    """

    name: str
    bits: int
    learn: LearnCodebook
    group: int | None = None

    data_dependent = True
    matrix_tensors = ("weight_lut",)

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Packed ``weight``, ``weight_scale``, float32 ``weight_lut`` (1, 2^bits)."""
        reason = _unsupported_entries if self.integers else None
        lut = TensorSpec((1, 2**self.bits), torch.float32, reason)
        return {**self._packed_specs(shape, self.bits), "weight_lut": lut}

    @property
    def integers(self) -> bool:
        """Entries are int8 over ``UNITS``: products with int8 activations are exact in int32."""
        return self.bits == 4 and self.group is None

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        grouped = in_groups(x, self.group)  # (N, groups, group)
        weight = in_groups(broadcast_weights(x, weights), self.group)  # (1, groups, group)
        lut = self._learn_lut(grouped, weight) if outer is None else outer["weight_lut"]
        return {"weight_scale": self._fit_scale(grouped, weight, lut), "weight_lut": lut}

    def _encode(self, u: Tensor, qparams: QParams) -> Tensor:
        return _nearest(u, qparams["weight_lut"].reshape(-1))

    def _decode(self, codes: Tensor, qparams: QParams) -> Tensor:
        return qparams["weight_lut"].float().reshape(-1)[codes.int()]

    def _learn_lut(self, grouped: Tensor, weight: Tensor) -> Tensor:
        """The look-up table (1, 2^bits), rising, of a matrix (N, groups, group)."""
        stride = -(-grouped.numel() // SAMPLE)
        sample = grouped[::stride]
        amax = sample.abs().amax(-1, keepdim=True)
        unit = divide(sample, amax).flatten()
        moments = CodebookMoments(unit, (weight * amax.square()).flatten())
        entries = self.learn(moments, self.bits).reshape(1, -1)
        if self.integers:
            rounded = _int8_entries(entries, moments)
        else:
            rounded = torch.round(entries * _FINE) / _FINE
        return rounded.float() + 0.0  # no -0

    def _fit_scale(self, grouped: Tensor, weight: Tensor, lut: Tensor) -> Tensor:
        """Scale of each row or group (N, groups), in the dtype that is stored."""
        lut = lut.reshape(-1)
        amax = grouped.abs().amax(-1, keepdim=True)

        def nearest_entries(scale: Tensor) -> Tensor:
            return lut[_nearest(divide(grouped, scale), lut)]

        errors = []
        for fraction in _SCALE_FRACTIONS:
            scale = fraction * amax
            error = (nearest_entries(scale) * scale - grouped).square() * weight
            errors.append(error.sum(-1, True))
        scale = torch.tensor(_SCALE_FRACTIONS).to(amax)[torch.stack(errors).argmin(0)] * amax
        entries = nearest_entries(scale)
        along, norm = ((weight * entries * v).sum(-1, True) for v in (grouped, entries))
        return torch.where(norm > 0, along / norm, scale).squeeze(-1).to(scale_dtype(self.group))


def _int8_entries(entries: Tensor, moments: CodebookMoments) -> Tensor:
    """Stretch entries (1, L) to int8 over ``UNITS``; the scale makes up for the change of size.

    If the codebook is symmetric, each magnitude is rounded up or down, whichever combination has
    the lowest error.
    """
    amax = entries.abs().amax().clamp(min=1e-30)  # a matrix of zeros has only zeros
    units = entries / amax * (UNITS - 1)
    best = torch.round(units)
    half = units[0, units.shape[1] // 2 :]
    if torch.equal(units[0], torch.cat([-half.flip(0), half])):
        choices = torch.arange(2 ** len(half), device=units.device).unsqueeze(1)
        up = (choices >> torch.arange(len(half), device=units.device) & 1) * (half != half.floor())
        magnitude = half.floor() + up
        candidates = torch.cat([-magnitude.flip(1), magnitude], 1)
        errors = moments.error(candidates * (amax / (UNITS - 1)))
        best = candidates[errors.argmin()].unsqueeze(0)
    return best / UNITS


def _unsupported_entries(weight_lut: Tensor) -> str | None:
    units = weight_lut.float() * UNITS
    wrong = int(((units != units.round()) | (units.abs() > UNITS - 1)).sum())
    return f"{wrong} codebook entries that are not int8 over {UNITS}" if wrong else None


def _nearest(u: Tensor, lut: Tensor) -> Tensor:
    """Index of the nearest of the rising entries (L,); a tie goes to the lower entry."""
    return interval(u, (lut[1:] + lut[:-1]) / 2)


def interval(x: Tensor, bounds: Tensor) -> Tensor:
    """How many of the rising bounds (L,) lie below each number, int32: ``torch.bucketize``.

    On a CPU a binary search mispredicts every second branch: of few bounds and many numbers,
    counting takes 8 ns a number instead of 20.
    """
    if x.device.type != "cpu" or len(bounds) > 15 or x.numel() < 2**14:
        return torch.bucketize(x, bounds, out_int32=True)
    not_below = torch.zeros(x.shape, dtype=torch.int8)  # a NaN is above every bound
    for bound in bounds.tolist():
        not_below += x <= bound
    return len(bounds) - not_below.int()
