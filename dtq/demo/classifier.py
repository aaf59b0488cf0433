# SPDX-License-Identifier: Apache-2.0
"""A small image classifier. FID on its penultimate features suits the domain of the demo."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


class EmojiClassifier(nn.Module):
    """Four strided convolutions, average pool, one linear layer.

    Args:
        classes: number of labels.
        width: channels of the first stage; a feature has ``4 * width`` channels.
    """

    def __init__(self, classes: int = 99, width: int = 32) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        stages = [
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
                nn.Conv2d(after, after, 3, padding=1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            )
            for before, after in itertools.pairwise(channels)
        ]
        self.stages = nn.Sequential(*stages)
        self.num_features = channels[-1]
        self.head = nn.Linear(self.num_features, classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features.

        Args:
            images: float (B, 3, H, W) in [0, 1].

        Returns:
            float (B, num_features).
        """
        return F.silu(self.stages(images * 2 - 1)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, classes) of float images (B, 3, H, W) in [0, 1]."""
        return self.head(self.features(images))
