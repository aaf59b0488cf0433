# SPDX-License-Identifier: Apache-2.0
"""The choice of a transform, and how it becomes an online one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.linalg.hadamard import signs
from dtq.transforms.base import OnlineTransform


@dataclass(frozen=True)
class TransformChoice:
    """A transform and how it was found.

    Attributes:
        transform: what the layers of the site will run.
        label: the choice in words, such as ``smooth(0.35, max) + hadamard 64``.
        errors: relative output error by candidate family, empty when nothing was searched.
        rivals: other choices that came close; the caller may solve them too and keep the best.
    """

    transform: OnlineTransform
    label: str
    errors: dict[str, float]
    runner_ups: tuple[TransformChoice, ...] = ()


def _online(weights: Sequence[Tensor], s: Tensor | None, block: int, seed: int) -> OnlineTransform:
    w = weights[0]
    s = torch.ones(w.shape[1], device=w.device) if s is None else s
    sign = _signs(w, seed) if block > 1 else torch.ones(w.shape[1], device=w.device)
    return OnlineTransform.of(s, sign, block)


def _signs(w: Tensor, seed: int) -> Tensor:
    return signs(w.shape[1], seed).to(w.device)
