# SPDX-License-Identifier: Apache-2.0
"""Twin-log codebooks: a logarithmic grid for each sign (LRQ-DiT, 2508.03485).

The paper spaces entries evenly in log2|w| between the smallest and the largest magnitude of a row,
and searches how much of the top to clip. Most entries then lie near zero, where rounding costs
little: at 3 bits the squared error exceeds the signal. Here the low end is searched, too; the
codebook is symmetric with 2^bits entries; and weights are rounded to the nearest entry on the
linear axis, where the error is measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.formats.lut import CodebookMoments

_CLIPS = torch.linspace(0.3, 1.2, 46, dtype=torch.float64)  # A, in units of the amax
_RATIOS = torch.logspace(0.02, 0.6, 80, dtype=torch.float64)  # r, 1.05 to 4
_SHIFTS = torch.logspace(-3, 1, 41, dtype=torch.float64)  # e, in units of the amax


def geometric(moments: CodebookMoments, bits: int) -> Tensor:
    """``+-A r^-i``, with the pair (A, r) of the lowest squared error; rising, (2^bits,)."""
    return _best(moments, _CLIPS[:, None, None] * _RATIOS[:, None] ** -_rising(bits).flip(0))


def geometric_with_zero(moments: CodebookMoments, bits: int) -> Tensor:
    """Like :func:`geometric`, with the smallest magnitude replaced by an exact zero."""
    magnitude = _CLIPS[:, None, None] * _RATIOS[:, None] ** -_rising(bits).flip(0)
    magnitude[..., 0] = 0
    return _best(moments, magnitude)


def companded(moments: CodebookMoments, bits: int) -> Tensor:
    """``+-A ((1 + e)^f e^(1 - f) - e)``, f = 0..1: even steps of log(|w| + e), from an exact zero.

    LRQ-DiT's code has this offset e. There it is absolute, here it is in units of the scale.
    """
    f = _rising(bits) / (2 ** (bits - 1) - 1)
    e = _SHIFTS[:, None]
    return _best(moments, _CLIPS[:, None, None] * ((1 + e) ** f * e ** (1 - f) - e))


def _rising(bits: int) -> Tensor:
    return torch.arange(2 ** (bits - 1), dtype=torch.float64)


def _best(moments: CodebookMoments, magnitude: Tensor) -> Tensor:
    """Of rising magnitudes (clips, shapes, 2^(bits - 1)) those of lowest error, with both signs."""
    candidates = torch.cat([-magnitude.flip(-1), magnitude], -1).flatten(0, 1).to(moments.x)
    return candidates[moments.error(candidates).argmin()]
