# SPDX-License-Identifier: Apache-2.0
"""Smoothing: move the outliers of input channels into the weight, one vector for all timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dtq.calibrate.observers import InputStats


def _correlation_weighted(peaks: Tensor, w: Tensor) -> Tensor:
    rank = torch.argsort(torch.argsort(w)).double()
    ranks = torch.argsort(torch.argsort(peaks, dim=1), dim=1).double()
    centred, other = ranks - ranks.mean(1, keepdim=True), rank - rank.mean()
    rho = (centred @ other) / (centred.norm(dim=1) * other.norm()).clamp(min=1e-30)
    return torch.softmax(-rho, 0).to(peaks) @ peaks


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max": lambda peaks, w: peaks.amax(0),
    "mean": lambda peaks, w: peaks.mean(0),
    "first": lambda peaks, w: peaks[-1],
    "ssc": _correlation_weighted,
}
"""How the peaks of the timestep bins (bins, K), last bin noisiest, become one (K,).

``max`` is DiTAS' temporal aggregation (2409.07756, sec. 3.2); ``first`` the noisiest bin, the
static part of ViDiT-Q's balancing (2406.02540, sec. 3.3); ``ssc`` weighs each bin by
``softmax(-rho)``, rho the rank correlation of its peaks with the weight's (PTQ4DiT, 2405.16005,
sec. 3.3): steps whose outliers sit where the weight has none count more.
"""


def column_amax(weights: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of each input channel over matrices (N_i, K): float32 (K,)."""
    return torch.stack([m.float().abs().amax(0) for m in weights]).amax(0)


def smoothing(
    weights: Sequence[Tensor],
    stats: InputStats,
    *,
    alpha: float,
    beta: float | None = None,
    reduce: str = "max",
) -> Tensor:
    """Smoothing vector ``s_j = a_j^alpha / w_j^beta`` (SmoothQuant, 2211.10438, eq. 4).

    Args:
        weights: the matrices (N_i, K) that share the input.
        stats: channel peaks of that input per timestep bin.
        alpha: how much of the activation's range moves into the weight.
        beta: exponent of the weight's range; ``1 - alpha`` unless told.
        over: aggregation over timestep bins, a key of :data:`OVER`.

    Returns:
        float32 (K,), the input is divided by it; geometric mean 1, within [1e-3, 1e3].
    """
    w = column_amax(weights).clamp(min=1e-5)
    a = REDUCTIONS[reduce](stats.channels.amax().to(w), w).clamp(min=1e-5)
    log = alpha * a.log() - (1 - alpha if beta is None else beta) * w.log()
    s: Tensor = (log - log.mean()).exp().clamp(1e-3, 1e3)
    return s
