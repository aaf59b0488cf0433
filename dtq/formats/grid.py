# SPDX-License-Identifier: Apache-2.0
"""Sixteen fixed levels times a scale per row or group: 4-bit floats and NormalFloat.

A 4-bit float code is a sign bit (8) and the index of a magnitude. E2M1 is the element of the OCP
Microscaling formats (MX specification 1.0, sec. 5.3.3); E1M2 and E3M0 are its neighbours that
HQ-DiT (2405.19751) and LLM-FP4 (2310.16836) choose between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from dtq.formats.base import (
    PackedTensors,
    QParams,
    TensorSpec,
    divide,
    expand_groups,
    groups_of,
    in_groups,
    scale_dtype,
    scaled,
)
from dtq.formats.packing import pack_bits, packed_width, unpack_bits


@dataclass(frozen=True)
class Codebook:
    """Numbers by code. A level that occurs twice (-0) is only ever written as its lower code."""

    values: tuple[float, ...]

    @property
    def bits(self) -> int:
        return int(math.log2(len(self.values)))

    @property
    def top(self) -> float:
        return max(abs(v) for v in self.values)

    @cached_property
    def integers(self) -> tuple[tuple[int, ...], float] | None:
        """The levels as int8, and the power of two they are multiples of; None if there is none."""
        for unit in (1.0, 0.5, 0.25):
            if all(v / unit == int(v / unit) and abs(v / unit) <= 127 for v in self.values):
                return tuple(int(v / unit) for v in self.values), unit
        return None

    def codes(self, u: Tensor) -> Tensor:
        """Code of the nearest level, uint8; a tie goes to the even code."""
        codes, _, ends = _sorted(self.values, u.device)
        return codes[torch.bucketize(u, ends, out_int32=True)]

    def of(self, codes: Tensor) -> Tensor:
        """The levels of integer codes, float32."""
        return torch.tensor(self.values, device=codes.device)[codes.int()]

    def round(self, u: Tensor) -> Tensor:
        """The nearest levels themselves, float32."""
        _, levels, ends = _sorted(self.values, u.device)
        return levels[torch.bucketize(u, ends, out_int32=True)]


@cache
def _sorted(values: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """By rising level: codes, levels, and the largest number that each but the last stands for."""
    codes = sorted((c for c, v in enumerate(values) if v not in values[:c]), key=values.__getitem__)
    level = torch.tensor([values[c] for c in codes])
    middle = (level[1:] + level[:-1]) / 2
    below = torch.nextafter(middle, torch.tensor(-torch.inf))
    even = torch.tensor(codes[:-1]) % 2 == 0
    ends = torch.where(even, middle, below)  # the middle itself belongs to the even neighbour
    return torch.tensor(codes, dtype=torch.uint8, device=device), level.to(device), ends.to(device)


def _signed(*magnitudes: float) -> tuple[float, ...]:
    return (*magnitudes, *(-m + 0.0 for m in magnitudes))


class _E2M1(Codebook):
    """Its levels follow from the bits of a float32: many times faster than looking them up."""

    def round(self, u: Tensor) -> Tensor:
        size = u.detach().float().abs()
        # the power of two below it, 1 for what is smaller: levels lie half of that apart
        below = (size.clamp(1, 6).view(torch.int32) & 0x7F800000).view(torch.float32)
        # there float32 has the same spacing: the sum is rounded to a level, ties to even
        magic = below * (3 * 2.0**21)
        return size.clamp_(max=6).add_(magic).sub_(magic).copysign_(u).add_(0.0)  # -0 becomes 0


E1M2 = Codebook(_signed(0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5))
E2M1 = _E2M1(_signed(0, 0.5, 1, 1.5, 2, 3, 4, 6))
E3M0 = Codebook(_signed(0, 0.25, 0.5, 1, 2, 4, 8, 16))

# QLoRA (2305.14314, appendix E): quantiles of the normal distribution, half of the codes on each
# side of an exact zero, scaled to [-1, 1]. The constants that its code prints, so files agree.
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


def doubled(x: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, K) as twice their E2M1 levels, which are integers, and half the scales (M, 1).

    Args:
        peak: the largest magnitude of each row (M, 1), which the largest level stands for.
    """
    scale = peak / x.new_full(
        (1, 1), E2M1.top
    )  # a tensor: CUDA turns a number into its reciprocal
    return E2M1.round(divide(x, scale)) * 2, scale * 0.5


@dataclass(frozen=True)
class Grid:
    """``w = level * scale``, the largest level at the largest magnitude of the row or group.

    Row scales are float32, group scales bfloat16.
    """

    name: str
    levels: Codebook
    group: int | None = None

    vector = 1
    data_dependent = False

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        width = packed_width(self.name, columns, self.levels.bits)
        groups = groups_of(self.name, columns, self.group)
        return {
            "weight": TensorSpec((rows, width), torch.int8),
            "weight_scale": TensorSpec((rows, groups), scale_dtype(self.group)),
        }

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
        peak = in_groups(x.float(), self.group).abs().amax(-1)
        return {"weight_scale": (clip * peak / self.levels.top).to(scale_dtype(self.group))}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        scale = expand_groups(qparams["weight_scale"], x.shape[1], self.group, cols).float()
        return self.levels.round(divide(x.float(), scale)) * scale

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        scale = expand_groups(qparams["weight_scale"], x.shape[1], self.group, None).float()
        codes = self.levels.codes(divide(x.float(), scale))
        return {"weight": pack_bits(codes, self.levels.bits), **qparams}

    def unpack(self, tensors: PackedTensors) -> Tensor:
        levels = self.levels.of(unpack_bits(tensors["weight"], self.levels.bits))
        return scaled(levels, tensors["weight_scale"])
