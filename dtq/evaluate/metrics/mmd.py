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
        return _unbiased(_cubic(x, x), _cubic(y, y), _cubic(x, y)), 0.0
    g = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(subsets):
        p = x[torch.randperm(len(x), generator=g)[:size]]
        q = y[torch.randperm(len(y), generator=g)[:size]]
        distances.append(_unbiased(_cubic(p, p), _cubic(q, q), _cubic(p, q)))
    values = torch.tensor(distances, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def cmmd(a: Tensor, b: Tensor) -> float:
    """CLIP maximum mean discrepancy (2401.09603, sec. 4): MMD^2 of unit features, times 1000.

    The Gaussian kernel has ``SIGMA``. The estimator keeps the diagonal, as the authors' code does.

    Args:
        a: CLIP image embeddings (N, D) of any norm.
        b: CLIP image embeddings (M, D).
    """
    x, y = (torch.nn.functional.normalize(t.double(), dim=1) for t in (a, b))
    same = _gaussian(x, x).mean() + _gaussian(y, y).mean()
    return float(1000 * (same - 2 * _gaussian(x, y).mean()))


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(-squared / (2 * SIGMA**2))


def _unbiased(xx: Tensor, yy: Tensor, xy: Tensor) -> float:
    n, m = len(xx), len(yy)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * xy.mean())
