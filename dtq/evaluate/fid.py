# SPDX-License-Identifier: Apache-2.0
"""Frechet distance between two sets of features (FID, 1706.08500, sec. 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two feature sets.

    The trace of the matrix root is taken through the symmetric form
    ``sqrt(A)^T B sqrt(A)``, whose eigenvalues are real, in float64.

    Args:
        a: features (N, D), N >= 2.
        b: features (M, D), M >= 2.
    """
    return frechet_moments(*moments(a), *moments(b))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) in float64 of features (N, D)."""
    if len(features) < 2:
        raise ValueError("a Frechet distance needs at least 2 samples on each side")
    x = features.double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def frechet_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Frechet distance from means (D,) and covariances (D, D)."""
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b.double() @ root).clamp(min=0).sqrt().sum()
    gap = (mean_a.double() - mean_b.double()).square().sum()
    return float(gap + cov_a.double().trace() + cov_b.double().trace() - 2 * cross)
