# SPDX-License-Identifier: Apache-2.0
"""The studentized bootstrap: bounds and p-values of the mean of paired differences.

Bootstrap-t (Efron and Tibshirani, An Introduction to the Bootstrap, sec. 12.5) resamples the
differences, and uses the quantiles of ``t* = (mean* - mean) / se*`` in place of Student's. The
percentile interval is too short if a few prompts get much worse, which is the important case.
``docs/gate.md`` lists the coverage of this interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CHUNK = 4_000_000  # resampled values at once: 32 MB


@dataclass(frozen=True)
class Paired:
    """The bootstrap of one set of paired differences; a positive difference is worse.

    Attributes:
        mean: of the differences.
        se: its standard error, with the floor added.
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
        """p-value of "the mean is not below the margin"; a small one shows that it is below."""
        rank = np.searchsorted(self.t, self._statistic(margin), side="right")
        return float(1 + rank) / (1 + len(self.t))

    def p_above(self, margin: float) -> float:
        """p-value of "the mean is not above the margin"; a small one shows that it is above."""
        rank = len(self.t) - np.searchsorted(self.t, self._statistic(margin), side="left")
        return float(1 + rank) / (1 + len(self.t))

    def _statistic(self, margin: float) -> float:
        return (self.mean - margin) / self.se

    def _quantile(self, level: float) -> float:
        """The order statistic just outside the ranks that p-values count, so that bounds agree."""
        count = len(self.t)
        outwards = math.floor if level < 0.5 else math.ceil
        rank = outwards(level * (count + 1)) - 1
        return float(self.t[min(max(rank, 0), count - 1)])


def paired(
    differences: Sequence[float] | Floats, *, floor: float, resamples: int = 4000, seed: int = 0
) -> Paired:
    """Bootstrap the mean of paired differences.

    Args:
        differences: one per prompt (n,), n >= 2.
        floor: a difference, above 0, that is too small to matter. ``floor / sqrt(n)`` is added to
            the standard error in quadrature; without it, one different prompt among equal ones
            would have an unbounded interval.
        resamples: R; 4000 give p-values down to 0.00025.
        seed: of the resampling.

    Raises:
        ValueError: fewer than two differences, a difference that is not finite, or a floor that is
            not above 0.
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
    t = []
    for start in range(0, resamples, max(1, _CHUNK // n)):
        rows = min(resamples - start, max(1, _CHUNK // n))
        drawn = d[rng.integers(0, n, size=(rows, n))]  # (rows, n)
        se = np.sqrt(drawn.var(1, ddof=1) / n + least**2)  # (rows,)
        t.append((drawn.mean(1) - mean) / se)
    standard_error = math.sqrt(float(d.var(ddof=1)) / n + least**2)
    return Paired(mean, standard_error, np.sort(np.concatenate(t)))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses are rejected, with a family-wise error rate of ``alpha`` (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > alpha / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def sign_test(differences: Sequence[float] | Floats) -> float:
    """p-value of "worse is not more frequent than better"; ignores equals, makes no assumptions."""
    d: Floats = np.asarray(differences, dtype=np.float64)
    worse, n = int((d > 0).sum()), int((d != 0).sum())
    return sum(math.comb(n, k) for k in range(worse, n + 1)) / 2**n


def samples_needed(sigma: float, distance: float, alpha: float, power: float = 0.8) -> int:
    """Number of prompts that separates a mean from the margin: ``((z_a + z_b) sigma / d)^2``.

    Args:
        sigma: standard deviation of the differences.
        distance: d, between mean and margin, on the scale of ``sigma``.
        alpha: error probability.
        power: probability of the decision; 0.8 by convention.
    """
    z = NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(power)
    return math.ceil((z * sigma / distance) ** 2)
