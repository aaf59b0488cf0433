# SPDX-License-Identifier: Apache-2.0
"""The block formats of GGUF files (ggml, MIT), so that dtq calibrates into them and runs them.

- K-quants, superblocks of 256 columns. A superblock has one float16 scale ``d``, and each of its
  groups of 16 or 32 columns an integer scale ``s``. ``q6_k`` and ``q3_k`` are symmetric, ``w = d *
  s * q`` with signed ``s``. ``q2_k``, ``q4_k`` and ``q5_k`` also have a float16 ``dmin`` per
  superblock and an integer ``m`` per group: ``w = d * s * q - dmin * m``, q from 0.
- ``iq4_nl``: 16 fixed integers times a float16 scale per 32 columns, of either sign.
- ``q8_0``: int8 times a float16 scale per 32 columns.

The numbers are those of ggml, bit for bit. The tensors are dtq's own, because its fine-tuning
trains scales; ``dtq/engines/gguf_blocks.py`` converts them to the bytes of a file and back.

Scales are fitted by the weighted error: a grid of ranges for each group, each refined by least
squares, then every integer scale against its neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.formats.base import Clip, CodebookFormat, Format, PackedTensors, QParams, TensorSpec
from dtq.formats.groups import broadcast_weights, divide, expand_groups, in_groups, num_groups
from dtq.formats.packing import pack_bits, packed_width, unpack_bits

SUPERBLOCK = 256
_HALF_MAX = 65504.0
_RANGES = torch.linspace(-0.9, 0.9, 13)
"""Added to the largest code when the range of a group is divided by it: wider or narrower."""


@dataclass(frozen=True)
class KQuant(Format):
    """Integers with an integer scale per group and a float16 scale per superblock of 256 columns.

    Attributes:
        name: key of ``FORMATS``, the name of the type in GGUF.
        bits: bits of a code.
        columns: columns that share an integer scale.
        scale_bits: bits of an integer scale.
        minimum: whether groups have a minimum, and codes count from it; otherwise codes and
            integer scales are signed.
    """

    name: str
    bits: int
    columns: int
    scale_bits: int
    minimum: bool

    group = SUPERBLOCK
    data_dependent = True

    @property
    def low(self) -> int:
        """Smallest code."""
        return 0 if self.minimum else -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return self.low + 2**self.bits - 1

    @property
    def scale_low(self) -> int:
        """Smallest integer scale."""
        return 0 if self.minimum else -(2 ** (self.scale_bits - 1))

    @property
    def scale_high(self) -> int:
        """Largest integer scale."""
        return self.scale_low + 2**self.scale_bits - 1

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Packed ``weight``, float16 ``weight_scale``, packed ``weight_scale_2``; the minima."""
        rows, columns = shape
        blocks = num_groups(self.name, columns, SUPERBLOCK)
        width = blocks * SUPERBLOCK // self.columns * self.scale_bits // 8
        half = TensorSpec((rows, blocks), torch.float16)
        integers = TensorSpec((rows, width), torch.int8)
        packed = TensorSpec((rows, packed_width(self.name, columns, self.bits)), torch.int8)
        specs = {"weight": packed, "weight_scale": half, "weight_scale_2": integers}
        return specs | ({"weight_min": half, "weight_min_2": integers} if self.minimum else {})

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        """Nearest representable values, float32; see :meth:`Format.fake_quantize`."""
        codes, scale, floor = self._quantize(x, qparams, cols)
        return codes * scale - floor

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        """Packed codes and integer scales of ``x`` (N, K), and the float16 scales."""
        codes, _, _ = self._quantize(x, qparams)
        tensors = {
            "weight": pack_bits(codes - self.low, self.bits),
            "weight_scale": qparams["weight_scale"],
            "weight_scale_2": pack_bits(qparams["scale_2"] - self.scale_low, self.scale_bits),
        }
        if self.minimum:
            tensors["weight_min"] = qparams["weight_min"]
            tensors["weight_min_2"] = pack_bits(qparams["min_2"], self.scale_bits)
        return tensors

    def unpack(self, tensors: PackedTensors) -> Tensor:
        """The float32 matrix (N, K) that packed tensors represent."""
        params = self.integers(tensors)
        codes = unpack_bits(tensors["weight"], self.bits).float() + self.low
        grouped = in_groups(codes, self.columns)
        scale, floor = self._scales(params)
        return (grouped * scale.unsqueeze(-1) - floor.unsqueeze(-1)).flatten(1)

    def integers(self, tensors: PackedTensors) -> QParams:
        """Packed tensors with their integer scales as float (N, groups), for :meth:`pack`."""
        params = {k: t for k, t in tensors.items() if k in ("weight_scale", "weight_min")}
        scale = unpack_bits(tensors["weight_scale_2"], self.scale_bits)
        params["scale_2"] = scale.float() + self.scale_low
        if self.minimum:
            params["min_2"] = unpack_bits(tensors["weight_min_2"], self.scale_bits).float()
        return params

    def _scales(self, qparams: QParams) -> tuple[Tensor, Tensor]:
        """Scale and amount to subtract of each group, float32 (N, groups)."""
        per_block = SUPERBLOCK // self.columns
        scale = _times(qparams["weight_scale"], qparams["scale_2"], per_block)
        if not self.minimum:
            return scale, torch.zeros_like(scale)
        return scale, _times(qparams["weight_min"], qparams["min_2"], per_block)

    def _quantize(
        self, x: Tensor, qparams: QParams, cols: slice | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes as float (N, columns); scale and amount to subtract of each column."""
        scales = self._scales(qparams)
        scale, floor = (expand_groups(v, x.shape[1], self.columns, cols) for v in scales)
        codes = torch.round(divide(x.float() + floor, scale)).clamp(self.low, self.high)
        return codes, scale, floor

    # ------------------------------------------------------------------------------------ fit

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        weight = in_groups(broadcast_weights(x, weights), self.columns)  # (1, groups, columns)
        grouped = in_groups(x, self.columns)  # (N, groups, columns)
        fit = self._fit_minimum if self.minimum else self._fit_symmetric
        scale, floor = fit(grouped, weight)
        names = ("weight_scale", "scale_2"), ("weight_min", "min_2")
        params: QParams = {}
        for (outer_name, name), value in zip(names, (scale, floor), strict=False):
            if self.minimum or name == "scale_2":
                params[outer_name], params[name] = self._two_levels(value)
        return self._refine(grouped, weight, params)

    def _fit_minimum(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and minimum, both not negative, with the lowest weighted error: (N, groups)."""
        low = x.amin(-1).clamp(max=0)
        span = x.amax(-1).clamp(min=0) - low
        best = _Best()
        for delta in _RANGES.tolist():
            scale, floor = span / (self.high + delta), -low
            for _ in range(2):  # round, then the best line through the codes
                codes = self._codes(x, scale, floor)
                best.add(_error(x, weight, codes, scale, floor), scale, floor)
                scale, floor = _line(x, weight, codes, scale, floor)
            codes = self._codes(x, scale, floor)
            best.add(_error(x, weight, codes, scale, floor), scale, floor)
        return best.scale, best.floor

    def _fit_symmetric(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale of either sign with the lowest weighted error: (N, groups); and zeros."""
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
        zero = torch.zeros_like(largest)
        best = _Best()
        for delta in _RANGES.tolist():
            scale = largest / (self.low + delta)  # the largest value becomes the lowest code
            codes = self._codes(x, scale, zero)
            best.add(_error(x, weight, codes, scale, zero), scale, zero)
            scale = _slope(x, weight, codes, scale)
            codes = self._codes(x, scale, zero)
            best.add(_error(x, weight, codes, scale, zero), scale, zero)
        return best.scale, zero

    def _codes(self, x: Tensor, scale: Tensor, floor: Tensor) -> Tensor:
        u = divide(x + floor.unsqueeze(-1), scale.unsqueeze(-1))
        return torch.round(u).clamp(self.low, self.high)

    def _two_levels(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (N, groups) as float16 per superblock and integers per group."""
        grouped = scale.unflatten(1, (-1, SUPERBLOCK // self.columns))
        end = self.scale_high if self.minimum else self.scale_low
        largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        outer = (largest / end).clamp(-_HALF_MAX, _HALF_MAX).half()
        integers = torch.round(divide(grouped, outer.float()))
        return outer.squeeze(-1), integers.clamp(self.scale_low, self.scale_high).flatten(1)

    def _refine(self, x: Tensor, weight: Tensor, params: QParams) -> QParams:
        """Move each integer scale and minimum by one where that lowers the error of its group."""
        start = dict(params)
        steps = [(s, m) for s in (0, -1, 1) for m in ((0, -1, 1) if self.minimum else (0,))]
        best = _Best()
        for step, step_min in steps:
            trial = dict(start)
            moved = start["scale_2"] + step
            trial["scale_2"] = moved.clamp(self.scale_low, self.scale_high)
            if self.minimum:
                trial["min_2"] = (start["min_2"] + step_min).clamp(0, self.scale_high)
            scale, floor = self._scales(trial)
            error = _error(x, weight, self._codes(x, scale, floor), scale, floor)
            best.add(error, trial["scale_2"], trial.get("min_2", trial["scale_2"]))
        refined = {**params, "scale_2": best.scale}
        return refined | ({"min_2": best.floor} if self.minimum else {})


class _Best:
    """The scale and minimum of each group with the lowest error so far."""

    def __init__(self) -> None:
        self.error = self.scale = self.floor = torch.empty(0)

    def add(self, error: Tensor, scale: Tensor, floor: Tensor) -> None:
        if self.error.numel() == 0:
            self.error, self.scale, self.floor = error, scale, floor
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.floor = torch.where(better, floor, self.floor)


@dataclass(frozen=True)
class HalfBlock(CodebookFormat):
    """A fixed table of integers times a float16 scale per 32 columns: ``iq4_nl``, ``q8_0``.

    Attributes:
        name: key of ``FORMATS``.
        bits: bits of a code.
        values: rising entries of the table; empty: the integers from -127 to 127.
    """

    name: str
    bits: int
    values: tuple[int, ...] = ()

    group = 32

    @property
    def data_dependent(self) -> bool:  # type: ignore[override]
        """A table is fitted by its error; integers have the range of the group."""
        return bool(self.values)

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Packed ``weight``, float16 ``weight_scale`` (N, K / 32)."""
        return self._packed_specs(shape, self.bits, torch.float16)

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        grouped = in_groups(x, self.group)
        if not self.values:
            return {"weight_scale": _half(clip * grouped.abs().amax(-1) / 127)}
        weight = in_groups(broadcast_weights(x, weights), self.group)
        largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
        zero, best = torch.zeros_like(largest), _Best()
        for end in (self.values[0], self.values[-1]):  # the largest value at either end
            for fraction in torch.linspace(0.85, 1.15, 13).tolist():
                scale = largest / (end * fraction)
                for _ in range(2):
                    entries = self._entries(grouped, _half(scale).float())
                    rounded = _half(scale).float()
                    best.add(_error(grouped, weight, entries, rounded, zero), scale, zero)
                    scale = _slope(grouped, weight, entries, scale)
        return {"weight_scale": _half(best.scale)}

    def _entries(self, x: Tensor, scale: Tensor) -> Tensor:
        return self._decode(self._encode(divide(x, scale.unsqueeze(-1)), {}), {})

    def _encode(self, u: Tensor, qparams: QParams) -> Tensor:
        if not self.values:
            return torch.round(u).clamp(-127, 127) + 128
        table = torch.tensor(self.values, dtype=torch.float32, device=u.device)
        return torch.bucketize(u, (table[1:] + table[:-1]) / 2, out_int32=True)

    def _decode(self, codes: Tensor, qparams: QParams) -> Tensor:
        if not self.values:
            return codes.float() - 128
        table = torch.tensor(self.values, dtype=torch.float32, device=codes.device)
        return table[codes.int()]


IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The table of ``iq4_nl`` in ggml."""


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(-_HALF_MAX, _HALF_MAX).half()


def _times(outer: Tensor, integers: Tensor, per_block: int) -> Tensor:
    """Float16 scales (N, superblocks) times integers (N, groups), float32."""
    return (outer.float().unsqueeze(-1) * integers.unflatten(1, (-1, per_block))).flatten(1)


def _error(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, floor: Tensor) -> Tensor:
    """Weighted squared error of each group (N, groups)."""
    y = codes * scale.unsqueeze(-1) - floor.unsqueeze(-1)
    return (weight * (y - x).square()).sum(-1)


def _slope(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The scale with the lowest weighted error for given codes."""
    along, norm = (weight * codes * x).sum(-1), (weight * codes * codes).sum(-1)
    return torch.where(norm > 0, along / norm, scale)


def _line(
    x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, floor: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and minimum with the lowest weighted error for given codes, neither negative."""
    weight = weight.expand_as(x)
    one, q, qq = weight.sum(-1), (weight * codes).sum(-1), (weight * codes * codes).sum(-1)
    y, qy = (weight * x).sum(-1), (weight * codes * x).sum(-1)
    determinant = one * qq - q * q
    slope, offset = (one * qy - q * y) / determinant, (qq * y - q * qy) / determinant
    through_zero = offset > 0
    slope = torch.where(through_zero, qy / qq, slope)
    offset = torch.where(through_zero, torch.zeros_like(offset), offset)
    usable = (determinant > 0) & (slope > 0) & slope.isfinite() & offset.isfinite()
    return torch.where(usable, slope, scale), torch.where(usable, -offset, floor)
