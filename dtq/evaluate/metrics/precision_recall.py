# SPDX-License-Identifier: Apache-2.0
"""Inception score, and precision and recall of k-nearest-neighbor manifolds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEIGHBORS = 3
SPLIT = 5000
"""Samples per split of the Inception score, as in the ADM suite."""


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """``exp(E KL(p(y|x) || p(y)))`` (1606.03498, sec. 4), mean over splits. Higher is better.

    Args:
        logits: class logits (N, C). The samples after the last full split are a split of their own,
            as in the ADM suite.
        split: samples per split.
    """
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(1)  # (n, C)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(generated: Tensor, real: Tensor, k: int = NEIGHBORS) -> tuple[float, float]:
    """Improved precision and recall (1904.06991, sec. 2). Higher is better.

    Args:
        generated: features of generated images (N, D), N > k.
        real: features of the reference (M, D), M > k.
        k: the radius of a sample is the distance to its k-th nearest neighbor on the same side.

    Returns:
        Fraction of generated samples within the radius of a real one, and fraction of real samples
        within the radius of a generated one.

    Raises:
        ValueError: a side has no more than k samples.
    """
    x, y = generated.double(), real.double()
    if min(len(x), len(y)) <= k:
        raise ValueError(f"{k} neighbors need more than {k} samples on each side")
    across = distances(x, y)
    sides = is_covered(across, distances(y, y), k), is_covered(across.T, distances(x, x), k)
    precision, recall = (float(inside.double().mean()) for inside in sides)
    return precision, recall


def is_covered(across: Tensor, within: Tensor, k: int = NEIGHBORS) -> Tensor:
    """Whether each sample is within the radius of a sample of the other side, (N,).

    Args:
        across: distances (N, M) of the samples from those of the other side.
        within: distances (M, M) of the samples of the other side; the nearest is the sample itself.
        k: see :func:`precision_recall`.
    """
    radii = within.kthvalue(k + 1, dim=1).values
    return (across <= radii).any(1)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances of (N, D) and (M, D): (N, M)."""
    # differences, not ``x^2 + y^2 - 2xy``: equal samples have a distance of exactly 0
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
