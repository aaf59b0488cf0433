# SPDX-License-Identifier: Apache-2.0
"""A table of 16 levels that expands exactly to int8, with an e4m3 scale per 16 columns.

The numbers of ComfyUI's W4A8 files (comfy-kitchen, ``AsymW4A8Int8Layout``, Apache-2.0): ``w =
clamp(round(lut[q] * scale_2), -127, 127) * scale``, with one float32 scale per row, and ``scale_2``
in e4m3 per group. The expanded matrix is int8, so products with int8 activations are exact.

The table here is symmetric: level 15 - q is level q, negated. Then a column may change its sign,
which the rotation of those files needs (``dtq/engines/comfy_file.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.formats.base import Clip, Format, PackedTensors, QParams, TensorSpec
from dtq.formats.groups import broadcast_weights, divide, expand_groups, in_groups
from dtq.formats.lut import SAMPLE, CodebookMoments, interval, lloyd
from dtq.formats.packing import pack_bits, unpack_bits

_TINY = 1e-30
_STEPS = (1.0, 0.89, 1.12, 0.79, 1.26, 1.41, 1.59)  # e4m3 numbers are at most an eighth apart
_LARGEST, _SMALLEST = 448.0, 2.0**-9


@dataclass(frozen=True)
class TwoLevelLut(Format):
    """``w = int8(lut[q] * scale_2) * scale``.

    Attributes:
        name: key of ``FORMATS``.
        group: columns per e4m3 scale.
    """

    name: str
    group: int = 16

    bits = 4
    data_dependent = True
    matrix_tensors = ("weight_lut",)

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Packed ``weight``, ``weight_scale`` (N, 1), e4m3 ``weight_scale_2``, ``weight_lut``."""
        specs = self._packed_specs(shape, 4, torch.float8_e4m3fn)
        return {
            "weight": specs["weight"],
            "weight_scale": TensorSpec((shape[0], 1), torch.float32),
            "weight_scale_2": specs["weight_scale"],
            "weight_lut": TensorSpec((1, 16), torch.float32, _unsupported_levels),
        }

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        grouped = in_groups(x, self.group)  # (N, groups, group)
        weight = in_groups(broadcast_weights(x, weights), self.group)
        if outer is not None:
            lut, scale = outer["weight_lut"], outer["weight_scale"]
            return self._fit_groups(grouped / scale.unsqueeze(-1), weight, lut, scale)[0]
        scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=_TINY)
        target = grouped / scale.unsqueeze(-1)
        # integers decide where groups are small: the table of equal weights may be the better one
        tables = [_symmetric_lut(grouped, weight)]
        if weights is not None:
            tables.append(_symmetric_lut(grouped, torch.ones_like(weight)))
        fits = [self._fit_groups(target, weight, lut, scale) for lut in tables]
        return min(fits, key=lambda fit: fit[1])[0]

    def _fit_groups(
        self, target: Tensor, weight: Tensor, lut: Tensor, scale: Tensor
    ) -> tuple[QParams, float]:
        """Parameters with the best e4m3 scale of each group under a table, and their error.

        ``target`` (N, groups, group) is in units of the row scales.
        """
        start = _least_squares_scale(target, weight, lut)
        best_error, best = torch.full_like(start, torch.inf), _e4m3(start)
        for step in _STEPS:
            candidate = _e4m3(start * step)
            level = self._levels(target.flatten(1), candidate, lut)
            error = (weight * (in_groups(level, self.group) - target).square()).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, candidate.float(), best.float()).to(torch.float8_e4m3fn)
        params = {"weight_scale": scale, "weight_scale_2": best, "weight_lut": lut}
        return params, float((best_error.sum(1, keepdim=True) * scale.square()).sum())

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        """Nearest representable values, float32; see :meth:`Format.fake_quantize`."""
        scale = qparams["weight_scale"]
        u = x.float() / scale
        return self._levels(u, qparams["weight_scale_2"], qparams["weight_lut"], cols) * scale

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        """Packed codes of ``x`` (N, K), and the parameters as they are."""
        u = x.float() / qparams["weight_scale"]
        codes = self._codes(u, qparams["weight_scale_2"], qparams["weight_lut"])
        return {
            "weight": pack_bits(codes, 4),
            **{key: qparams[key] for key in ("weight_scale", "weight_scale_2", "weight_lut")},
        }

    def unpack(self, tensors: PackedTensors) -> Tensor:
        """The float32 matrix (N, K) that packed tensors represent."""
        exact = self._unrounded(tensors)
        rounded = exact.round().clamp(-127, 127)
        # the gradient of rounding is that of the number before it
        level = exact + (rounded - exact).detach() if exact.requires_grad else rounded
        return level * tensors["weight_scale"].float()

    def expand(self, tensors: PackedTensors) -> Tensor:
        """Exact int8 (N, K) of packed tensors, without the scale per row."""
        return self._unrounded(tensors).round().clamp(-127, 127).to(torch.int8)

    def _unrounded(self, tensors: PackedTensors) -> Tensor:
        """``lut[q] * scale_2``, float32 (N, K)."""
        codes = unpack_bits(tensors["weight"], 4).int()
        entries = in_groups(tensors["weight_lut"].float().reshape(-1)[codes], self.group)
        return (entries * tensors["weight_scale_2"].float().unsqueeze(-1)).flatten(1)

    def _codes(self, u: Tensor, scale_2: Tensor, lut: Tensor, cols: slice | None = None) -> Tensor:
        """Code of the nearest int8 level of each number (N, columns), in units of the row scale."""
        return self._nearest(u, scale_2, lut, cols)[0]

    def _levels(self, u: Tensor, scale_2: Tensor, lut: Tensor, cols: slice | None = None) -> Tensor:
        """The nearest int8 level of each number, float32."""
        return self._nearest(u, scale_2, lut, cols)[1]

    def _nearest(
        self, u: Tensor, scale_2: Tensor, lut: Tensor, cols: slice | None
    ) -> tuple[Tensor, Tensor]:
        table = lut.reshape(-1)
        scale = expand_groups(scale_2.float(), u.shape[1], self.group, cols)
        first = interval(divide(u, scale), (table[1:] + table[:-1]) / 2)
        level = _level(_look_up(table, first), scale)
        # levels rise with the codes, so rounding to int8 may make only that the nearest which is on
        # the other side of the number
        second = (first + (u > level).int() - (u < level).int()).clamp(0, 15)
        other = _level(_look_up(table, second), scale)
        nearer = (other - u).abs() < (level - u).abs()
        return torch.where(nearer, second, first), torch.where(nearer, other, level)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    return table.index_select(0, codes.flatten()).view(codes.shape)


def _level(entries: Tensor, scale: Tensor) -> Tensor:
    return (entries * scale).round().clamp(-127, 127)


def _e4m3(scale: Tensor) -> Tensor:
    return scale.clamp(_SMALLEST, _LARGEST).to(torch.float8_e4m3fn)


def _symmetric_lut(grouped: Tensor, weight: Tensor) -> Tensor:
    """Levels (1, 16), rising and symmetric, of numbers over the amax of their group (Lloyd)."""
    stride = -(-grouped.numel() // SAMPLE)
    sample = grouped[::stride]
    amax = sample.abs().amax(-1, keepdim=True)
    unit, order = divide(sample, amax).flatten().abs().double().sort()
    mass = (weight * amax.square()).expand_as(sample).flatten()[order]
    if not bool(mass.any()):  # a matrix of zeros
        mass = torch.ones_like(mass)
    both = torch.cat([-unit.flip(0), unit]), torch.cat([mass.flip(0), mass])
    entries = lloyd(CodebookMoments(*both, rising=True), 4)
    magnitude = ((entries - entries.flip(0)) / 2)[8:].clamp(min=1e-3).cummax(0).values
    return torch.cat([-magnitude.flip(0), magnitude]).float().reshape(1, -1)


def _least_squares_scale(target: Tensor, weight: Tensor, lut: Tensor) -> Tensor:
    """Scale of each group (N, groups) with the lowest error, before it is rounded to e4m3."""
    table = lut.reshape(-1)
    bounds = (table[1:] + table[:-1]) / 2
    scale = target.abs().amax(-1)
    for _ in range(3):
        entries = _look_up(table, interval(divide(target, scale.unsqueeze(-1)), bounds))
        along, norm = ((weight * entries * v).sum(-1) for v in (target, entries))
        scale = torch.where(norm > 0, along / norm, scale).clamp(min=0)
    return scale


def _unsupported_levels(weight_lut: Tensor) -> str | None:
    lut = weight_lut.float().reshape(-1)
    if torch.equal(lut, -lut.flip(0)) and bool((lut.diff() >= 0).all()):
        return None
    return "a table that does not rise, or is not symmetric"
