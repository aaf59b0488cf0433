# SPDX-License-Identifier: Apache-2.0
"""Frechet distance between two sets of features (FID, 1706.08500, sec. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureMoments:
    """The Gaussian fitted to a set of features; caches the square root of its covariance.

    Attributes:
        mean: float64 (D,).
        cov: float64 (D, D).
    """

    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureMoments:
        """Moments of features (N, D), N >= 2, in float64."""
        x = _in_float64(features)
        return cls(x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]))

    @cached_property
    def root(self) -> Tensor:
        """Symmetric square root of the covariance (D, D)."""
        values, vectors = torch.linalg.eigh(self.cov)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, other: FeatureMoments) -> float:
        """Frechet distance to other moments; real eigenvalues through ``root(A) B root(A)``."""
        inner = torch.linalg.eigvalsh(self.root @ other.cov @ self.root)
        cross = inner.clamp(min=0).sqrt().sum()
        gap = (self.mean - other.mean).square().sum()
        return float(gap + self.cov.trace() + other.cov.trace() - 2 * cross)

    def distance_to_features(self, features: Tensor) -> float:
        """Frechet distance to features (N, D); for N < D by singular values, no D x D root."""
        if len(features) >= features.shape[1]:
            return self.distance(FeatureMoments.of(features))
        x = _in_float64(features)
        mean = x.mean(0)
        centered = (x - mean) / (len(x) - 1) ** 0.5  # (N, D); centered^T centered is the covariance
        cross = torch.linalg.svdvals(centered @ self.root).sum()
        gap = (self.mean - mean).square().sum()
        return float(gap + self.cov.trace() + centered.square().sum() - 2 * cross)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two feature sets.

    Args:
        a: features (N, D), N >= 2.
        b: features (M, D), M >= 2.
    """
    if max(len(a), len(b)) >= a.shape[1]:
        return FeatureMoments.of(a).distance_to_features(b)
    # few samples: both roots have at most N and M columns, and no D x D matrix is needed
    x, y = _in_float64(a), _in_float64(b)
    roots = [(t - t.mean(0)) / (len(t) - 1) ** 0.5 for t in (x, y)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    return float(gap + sum(t.square().sum() for t in roots) - 2 * cross)


def _in_float64(features: Tensor) -> Tensor:
    if len(features) < 2:
        raise ValueError("a Frechet distance needs at least 2 samples on each side")
    return features.double()
