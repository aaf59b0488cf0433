# SPDX-License-Identifier: Apache-2.0
"""The mean of paired differences, and how sure it is: the studentized bootstrap.

Bootstrap-t (Efron and Tibshirani, An Introduction to the Bootstrap, sec. 12.5): resample the
differences, and take the quantiles of ``t* = (mean* - mean) / se*`` in place of Student's. The
percentile interval is too short exactly where it matters, when a few prompts get much worse;
``docs/gate.md`` has the coverage of this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CHUNK = 4_000_000  # resampled values at once: 32 MB


@dataclass(frozen=True)
class Paired:
    """The bootstrap of one set of paired differences; positive is worse.

    Attributes:
        mean: of the differences.
        se: its standard error, the floor included.
        t: sorted ``t*`` of the resamples (R,).
    """

    mean: float
    se: float
    t: Floats

    def upper(self, alpha: float) -> float:
        """One-sided upper bound of the mean: ``mean - t*_alpha se``."""
        return self.mean - self._quantile(alpha) * self.se

    def lower(self, alpha: float) -> float:
        """One-sided lower bound of the mean: ``mean - t*_(1 - alpha) se``."""
        return self.mean - self._quantile(1 - alpha) * self.se

    def p_below(self, margin: float) -> float:
        """p-value of "the mean is not below the margin"; small: it is below."""
        seen = np.searchsorted(self.t, self._statistic(margin), side="right")
        return float(1 + seen) / (1 + len(self.t))

    def p_above(self, margin: float) -> float:
        """p-value of "the mean is not above the margin"; small: it is above."""
        seen = len(self.t) - np.searchsorted(self.t, self._statistic(margin), side="left")
        return float(1 + seen) / (1 + len(self.t))

    def _statistic(self, margin: float) -> float:
        return (self.mean - margin) / self.se

    def _quantile(self, share: float) -> float:
        """The order statistic whose rank is outside what p-values count: bounds agree with them."""
        count = len(self.t)
        if share < 0.5:
            rank = math.floor(share * (count + 1)) - 1
        else:
            rank = math.ceil(share * (count + 1)) - 1
        return float(self.t[min(max(rank, 0), count - 1)])


def paired(
    differences: Sequence[float] | Floats, *, floor: float, resamples: int = 4000, seed: int = 0
) -> Paired:
    """Bootstrap the mean of paired differences.

    Args:
        differences: one per prompt (n,), n >= 2.
        floor: a difference too small to be of interest, above 0. ``floor / sqrt(n)`` is the least
            standard error; without it one odd prompt among equal ones has an endless interval.
        resamples: R.
        seed: of the resampling.

    Raises:
        ValueError: fewer than two differences, one that is not finite, or no floor.
    """
    d: Floats = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) < 2 or not np.isfinite(d).all():
        raise ValueError("paired differences must be at least two finite numbers")
    if not floor > 0:
        raise ValueError("the floor of the standard error must be above 0")
    n = len(d)
    rng = np.random.default_rng(seed)
    mean = float(d.mean())
    least = floor / math.sqrt(n)
    parts = []
    for start in range(0, resamples, max(1, _CHUNK // n)):
        rows = min(resamples - start, max(1, _CHUNK // n))
        drawn = d[rng.integers(0, n, size=(rows, n))]  # (rows, n)
        se = np.sqrt(drawn.var(1, ddof=1) / n + least**2)  # (rows,)
        parts.append((drawn.mean(1) - mean) / se)
    own = math.sqrt(float(d.var(ddof=1)) / n + least**2)
    return Paired(mean, own, np.sort(np.concatenate(parts)))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses are rejected, all together at level ``alpha`` (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > alpha / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def sign_test(differences: Sequence[float] | Floats) -> float:
    """p-value of "worse is not more frequent than better", equal ones left out; no assumption."""
    d: Floats = np.asarray(differences, dtype=np.float64)
    worse, n = int((d > 0).sum()), int((d != 0).sum())
    return sum(math.comb(n, k) for k in range(worse, n + 1)) / 2**n


def samples_needed(sigma: float, distance: float, alpha: float, power: float = 0.8) -> int:
    """Prompts that show a mean ``distance`` away from the margin: ``((z_a + z_b) sigma / d)^2``."""
    z = _normal_quantile(1 - alpha) + _normal_quantile(power)
    return math.ceil((z * sigma / distance) ** 2)


def _normal_quantile(share: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(share)
