# SPDX-License-Identifier: Apache-2.0
"""Smoothing: move the outliers of input channels into the weight, one vector for all timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dtq.calibrate.observers import InputStats


def _correlation_weighted(amax: Tensor, w: Tensor) -> Tensor:
    rank = torch.argsort(torch.argsort(w)).double()
    ranks = torch.argsort(torch.argsort(amax, dim=1), dim=1).double()
    centered, other = ranks - ranks.mean(1, keepdim=True), rank - rank.mean()
    rho = (centered @ other) / (centered.norm(dim=1) * other.norm()).clamp(min=1e-30)
    return torch.softmax(-rho, 0).to(amax) @ amax


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max": lambda amax, w: amax.amax(0),
    "mean": lambda amax, w: amax.mean(0),
    "first": lambda amax, w: amax[-1],
    "ssc": _correlation_weighted,
}
"""How the channel amax of the timestep bins (bins, K), last bin noisiest, is reduced to one (K,).

``max`` is DiTAS' temporal aggregation (2409.07756, sec. 3.2). ``first`` takes the noisiest bin, the
static part of ViDiT-Q's balancing (2406.02540, sec. 3.3). ``ssc``, Spearman's rho-guided salience
calibration (PTQ4DiT, 2405.16005, sec. 3.3), weights each bin by ``softmax(-rho)``, rho the rank
correlation of its amax with that of the weight: timesteps count more if their outliers lie where
the weight has none.
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
        weights: the matrices (N_i, K) that read the input. Only their column amax counts.
        stats: statistics of the input, with the channel amax per timestep bin.
        alpha: exponent of the activation's amax: how much of its range moves into the weight.
        beta: exponent of the weight's amax; None: ``1 - alpha``.
        reduce: reduction over timestep bins, a key of :data:`REDUCTIONS`.

    Returns:
        float32 (K,), the input is divided by it; geometric mean 1, within [1e-3, 1e3].
    """
    return smoothing_vector(*log_ranges(weights, stats, reduce), alpha, beta)


def log_ranges(weights: Sequence[Tensor], stats: InputStats, reduce: str) -> tuple[Tensor, Tensor]:
    """Logarithms of ``a_j`` and ``w_j`` in :func:`smoothing`, float32 (K,) each."""
    w = column_amax(weights).clamp(min=1e-5)
    a = REDUCTIONS[reduce](stats.channels.amax().to(w), w).clamp(min=1e-5)
    return a.log(), w.log()


def smoothing_vector(log_a: Tensor, log_w: Tensor, alpha: float, beta: float | None) -> Tensor:
    """The vector of :func:`smoothing` from logarithms of ranges.

    Args:
        log_a: of the input's amax, float32 (K,).
        log_w: of the weight's amax, float32 (K,).
        alpha: exponent of the activation's amax.
        beta: exponent of the weight's amax; None: ``1 - alpha``.

    Returns:
        float32 (K,).
    """
    log = alpha * log_a - (1 - alpha if beta is None else beta) * log_w
    s: Tensor = (log - log.mean()).exp().clamp(1e-3, 1e3)
    return s
