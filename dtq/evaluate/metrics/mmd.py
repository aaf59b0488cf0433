# SPDX-License-Identifier: Apache-2.0
"""Kernel distances between two sets of features, KID and CMMD. Lower is closer; 0: no distance."""

from __future__ import annotations

import torch
from torch import Tensor

SIGMA = 10.0
"""Of CMMD's Gaussian kernel, as fixed by its authors."""


def kid(a: Tensor, b: Tensor, *, size: int = 1000, subsets: int = 100) -> tuple[float, float]:
    """Kernel Inception distance (1801.01401, sec. 4): unbiased MMD^2, kernel ``(x.y / D + 1)^3``.

    Args:
        a: features (N, D), N >= 2.
        b: features (M, D), M >= 2.
        size: samples per subset. If a side has fewer, its size; if both have exactly this many,
            there is one subset.
        subsets: number of subsets, drawn without replacement from a fixed seed.

    Returns:
        Mean and standard deviation over the subsets; the deviation of one subset is 0.

    Raises:
        ValueError: a side has fewer than 2 samples.
    """
    x, y = a.double(), b.double()
    size = min(size, len(x), len(y))
    if size < 2:
        raise ValueError("KID needs at least 2 samples on each side")
    if size == len(x) == len(y):
        return _unbiased(cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)), 0.0
    g = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(subsets):
        p = x[torch.randperm(len(x), generator=g)[:size]]
        q = y[torch.randperm(len(y), generator=g)[:size]]
        distances.append(_unbiased(cubic_kernel(p, p), cubic_kernel(q, q), cubic_kernel(p, q)))
    values = torch.tensor(distances, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def cmmd(a: Tensor, b: Tensor) -> float:
    """CLIP maximum mean discrepancy (2401.09603, sec. 4): MMD^2 of unit features, times 1000.

    The Gaussian kernel has ``SIGMA``. The estimator keeps the diagonal, as the authors' code does.

    Args:
        a: CLIP image embeddings (N, D) of any norm.
        b: CLIP image embeddings (M, D).
    """
    x, y = a.double(), b.double()
    same = gaussian_kernel(x, x).mean() + gaussian_kernel(y, y).mean()
    return float(1000 * (same - 2 * gaussian_kernel(x, y).mean()))


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``(x.y / D + 1)^3`` of features (N, D) and (M, D): (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Gaussian kernel of the unit vectors of (N, D) and (M, D), with ``SIGMA``: (N, M)."""
    x, y = (torch.nn.functional.normalize(t, dim=1) for t in (x, y))
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(-squared / (2 * SIGMA**2))


def _unbiased(xx: Tensor, yy: Tensor, xy: Tensor) -> float:
    n, m = len(xx), len(yy)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * xy.mean())
