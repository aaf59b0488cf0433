# SPDX-License-Identifier: Apache-2.0
"""How activations are kept between the quantize step and the product: ``ACTS``.

A row is a token. ``int8-row`` takes its scale from the token itself, so no token depends on the
rest of its batch (ViDiT-Q, 2406.02540, sec. 3.2). ``int8-step`` reads one scale per layer and
timestep bin from the file. ``none`` leaves activations in the compute dtype (weight-only).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-8
"""Smallest activation scale. Rows that are all zero take scale 1."""


@dataclass(frozen=True)
class Acts:
    """One way to keep activations.

    Attributes:
        bits: bits of a code; 16 means not quantized.
        static: the scale is stored, one per timestep bin, instead of measured.
    """

    name: str
    bits: int
    static: bool = False


ACTS: dict[str, Acts] = {
    a.name: a for a in (Acts("none", 16), Acts("int8-row", 8), Acts("int8-step", 8, static=True))
}


def row_scale(x: Tensor) -> Tensor:
    """Scale of each row, float32 (..., 1), of float32 (..., K): its largest magnitude over 127."""
    peak = x.abs().amax(-1, keepdim=True)
    return torch.where(peak > 0, (peak / 127).clamp(min=FLOOR), torch.ones_like(peak))


def row_codes(x: Tensor, scale: Tensor) -> Tensor:
    """Codes in [-127, 127] as float, ties to even."""
    return torch.round(x / scale).clamp(-127, 127)


def fake_quantize(x: Tensor, acts: Acts) -> Tensor:
    """Float32 ``x`` (R, K) after quantizing and back; a static scale is fitted to ``x``."""
    if acts.bits == 16:
        return x
    scale = row_scale(x.reshape(1, -1)) if acts.static else row_scale(x)
    return row_codes(x, scale) * scale
