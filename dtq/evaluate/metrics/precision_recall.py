# SPDX-License-Identifier: Apache-2.0
"""Inception score, and precision and recall of k-nearest-neighbour manifolds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEIGHBOURS = 3
SPLIT = 5000
"""Samples in a split of the Inception score, as in the ADM suite."""


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """``exp(E KL(p(y|x) || p(y)))`` (1606.03498, sec. 4), mean over splits. More is better.

    Args:
        logits: class logits (N, C); the samples after the last whole split are one of their own,
            as in the ADM suite.
        split: samples of a split.
    """
    found = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(1)  # (n, C)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        found.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(found).mean())


def precision_recall(made: Tensor, real: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (1904.06991, sec. 2). More is better.

    Args:
        made: features of generated pictures (N, D), N > k.
        real: features of the reference (M, D), M > k.
        k: the radius of a sample reaches its k-th nearest neighbour of the same side.

    Returns:
        Share of made ones within a real one's radius, share of real ones within a made one's.
    """
    x, y = made.double(), real.double()
    if min(len(x), len(y)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} samples on each side")
    across = _apart(x, y)  # (N, M)
    precision = (across <= _radii(y, k)[None, :]).any(1).double().mean()
    recall = (across <= _radii(x, k)[:, None]).any(0).double().mean()
    return float(precision), float(recall)


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance to the k-th neighbour (N,); the nearest of all is the sample itself."""
    return _apart(x, x).kthvalue(k + 1, dim=1).values


def _apart(x: Tensor, y: Tensor) -> Tensor:
    # differences, not ``x^2 + y^2 - 2xy``: equal samples are exactly 0 apart
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
