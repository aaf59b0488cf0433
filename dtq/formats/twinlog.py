# SPDX-License-Identifier: Apache-2.0
"""Twin-log levels: a logarithmic grid for each sign (LRQ-DiT, 2508.03485, twin-log quantization).

The paper places codes evenly in log2|w| between the smallest and the largest magnitude of a row and
searches a cut of the top. Most codes then lie near zero, where nothing is lost: at 3 bits the error
exceeds the signal. Here the low end is searched too, the levels are symmetric, a power of two of
them, and weights are rounded to the nearest level on the linear axis, where the error is measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.formats.lut import CodebookMoments

_CLIPS = torch.linspace(0.3, 1.2, 46, dtype=torch.float64)  # A, over the largest magnitude
_RATIOS = torch.logspace(0.02, 0.6, 80, dtype=torch.float64)  # r, 1.05 to 4
_SHIFTS = torch.logspace(-3, 1, 41, dtype=torch.float64)  # e, over the largest magnitude


def geometric(moments: CodebookMoments, bits: int) -> Tensor:
    """``+-A r^-i``: the pair (A, r) with the least error."""
    return _best(moments, _CLIPS[:, None, None] * _RATIOS[:, None] ** -_rising(bits).flip(0))


def geometric_with_zero(moments: CodebookMoments, bits: int) -> Tensor:
    """The same with the smallest magnitude replaced by an exact zero."""
    magnitude = _CLIPS[:, None, None] * _RATIOS[:, None] ** -_rising(bits).flip(0)
    magnitude[..., 0] = 0
    return _best(moments, magnitude)


def companded(moments: CodebookMoments, bits: int) -> Tensor:
    """``+-A ((1 + e)^f e^(1 - f) - e)``, f = 0..1: even steps of log(|w| + e), from an exact zero.

    LRQ-DiT's code has this offset; there it is absolute, here it is in units of the scale.
    """
    share = _rising(bits) / (2 ** (bits - 1) - 1)
    e = _SHIFTS[:, None]
    return _best(moments, _CLIPS[:, None, None] * ((1 + e) ** share * e ** (1 - share) - e))


def _rising(bits: int) -> Tensor:
    return torch.arange(2 ** (bits - 1), dtype=torch.float64)


def _best(moments: CodebookMoments, magnitude: Tensor) -> Tensor:
    """Of rising magnitudes (clips, shapes, 2^(bits - 1)) the best, with both signs."""
    tries = torch.cat([-magnitude.flip(-1), magnitude], -1).flatten(0, 1).to(moments.x)
    return tries[moments.error(tries).argmin()]
