# SPDX-License-Identifier: Apache-2.0
"""Sixteen fixed numbers times a scale per row or group: 4-bit floats and NormalFloat.

The code of a 4-bit float is a sign bit (8) and the index of a magnitude. E2M1 is the element type
of the OCP Microscaling formats (MX specification 1.0, sec. 5.3.3). E1M2 and E3M0 are the other
splits of three bits that HQ-DiT (2405.19751) and LLM-FP4 (2310.16836) choose between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from dtq.formats.base import Clip, CodebookFormat, QParams, TensorSpec
from dtq.formats.groups import divide, in_groups, scale_dtype


@dataclass(frozen=True)
class Codebook:
    """A fixed table of numbers; the code of a number is its index.

    Attributes:
        values: entries by code. Where an entry occurs twice (-0), only its lower code is written.
    """

    values: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(math.log2(len(self.values)))

    @property
    def amax(self) -> float:
        """Largest magnitude of an entry."""
        return max(abs(v) for v in self.values)

    @cached_property
    def integers(self) -> tuple[tuple[int, ...], float] | None:
        """Entries as int8 multiples of a power of two, and that power; None if there is none."""
        for unit in (1.0, 0.5, 0.25):
            if all(v / unit == int(v / unit) and abs(v / unit) <= 127 for v in self.values):
                return tuple(int(v / unit) for v in self.values), unit
        return None

    def encode(self, u: Tensor) -> Tensor:
        """Code of the nearest entry, uint8; a tie goes to the even code."""
        codes, _, bounds = _sorted(self.values, u.device)
        return codes[torch.bucketize(u, bounds, out_int32=True)]

    def decode(self, codes: Tensor) -> Tensor:
        """The entries of integer codes, float32."""
        return torch.tensor(self.values, device=codes.device)[codes.int()]

    def round(self, u: Tensor) -> Tensor:
        """The nearest entries, float32: ``decode(encode(u))``."""
        _, entries, bounds = _sorted(self.values, u.device)
        return entries[torch.bucketize(u, bounds, out_int32=True)]


@cache
def _sorted(values: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """By rising entry: codes, entries, and the upper bound of what rounds to each but the last."""
    codes = sorted((c for c, v in enumerate(values) if v not in values[:c]), key=values.__getitem__)
    entries = torch.tensor([values[c] for c in codes])
    middle = (entries[1:] + entries[:-1]) / 2
    below = torch.nextafter(middle, torch.tensor(-torch.inf))
    even = torch.tensor(codes[:-1]) % 2 == 0
    bounds = torch.where(even, middle, below)  # a tie belongs to the even neighbor
    codes_tensor = torch.tensor(codes, dtype=torch.uint8, device=device)
    return codes_tensor, entries.to(device), bounds.to(device)


def _signed(*magnitudes: float) -> tuple[float, ...]:
    return (*magnitudes, *(-m + 0.0 for m in magnitudes))


class _E2M1(Codebook):
    """Rounds with the bits of a float32, which is many times faster than a table look-up."""

    def round(self, u: Tensor) -> Tensor:
        magnitude = u.detach().float().abs()
        # the power of two at or below the magnitude, at least 1; entries are half of it apart
        power = (magnitude.clamp(1, 6).view(torch.int32) & 0x7F800000).view(torch.float32)
        # near ``magic`` float32 has the same spacing: the sum rounds to an entry, ties to even
        magic = power * (3 * 2.0**21)
        # -0 + 0.0 is 0
        return magnitude.clamp_(max=6).add_(magic).sub_(magic).copysign_(u).add_(0.0)


E1M2 = Codebook(_signed(0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5))
E2M1 = _E2M1(_signed(0, 0.5, 1, 1.5, 2, 3, 4, 6))
E3M0 = Codebook(_signed(0, 0.25, 0.5, 1, 2, 4, 8, 16))

# QLoRA (2305.14314, appendix E): quantiles of the normal distribution, half of the codes on each
# side of an exact zero, scaled to [-1, 1]. The constants are those of its code, so files agree.
NF4 = Codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)


def doubled(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows to E2M1 and double the entries, which makes them integers.

    Args:
        x: float32 (M, K).
        amax: largest magnitude of each row (M, 1); the largest entry stands for it.

    Returns:
        Twice the E2M1 entries, float32 (M, K), integers in [-12, 12]; half the scales (M, 1).
    """
    # a tensor: CUDA replaces the division by a number with a product with its reciprocal
    scale = amax / x.new_full((1, 1), E2M1.amax)
    return E2M1.round(divide(x, scale)) * 2, scale * 0.5


class FixedCodebookFormat(CodebookFormat):
    """A format whose codebook is the same for every matrix."""

    codebook: Codebook

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits of a code."""
        return self.codebook.bits

    def _encode(self, u: Tensor, qparams: QParams) -> Tensor:
        return self.codebook.encode(u)

    def _decode(self, codes: Tensor, qparams: QParams) -> Tensor:
        return self.codebook.decode(codes)

    def _round(self, u: Tensor, qparams: QParams) -> Tensor:
        return self.codebook.round(u)


@dataclass(frozen=True)
class Grid(FixedCodebookFormat):
    """``w = entry * scale``; the largest entry stands for the largest magnitude of a row or group.

    Attributes:
        name: key of ``FORMATS``.
        codebook: the entries.
        group: columns per scale; None: one float32 scale per row. Scales of groups are bfloat16.
    """

    name: str
    codebook: Codebook
    group: int | None = None

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """``weight``, the packed codes, and ``weight_scale``."""
        return self._packed_specs(shape, self.bits)

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        amax = in_groups(x, self.group).abs().amax(-1)
        return {"weight_scale": (clip * amax / self.codebook.amax).to(scale_dtype(self.group))}
