# SPDX-License-Identifier: Apache-2.0
"""The result of a transform method."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dtq.linalg.hadamard import signs
from dtq.transforms.base import OnlineTransform


@dataclass(frozen=True)
class TransformChoice:
    """A transform and how it was chosen.

    Attributes:
        transform: what the layers of the input group will run.
        label: the choice in words, such as ``smooth(0.35, max) + hadamard 64``.
        errors: relative squared output error of the best candidate of each kind of transform; empty
            when nothing was searched.
        runner_ups: other choices with nearly the same error. The caller may solve them, too, and
            keep the best.
    """

    transform: OnlineTransform
    label: str
    errors: dict[str, float] = field(default_factory=dict)
    runner_ups: tuple[TransformChoice, ...] = ()


def online_transform(
    w: Tensor,
    s: Tensor | None,
    block: int = 1,
    seed: int = 0,
    perm: Tensor | None = None,
    num_rotations: int = 1,
    divisor: bool = False,
) -> OnlineTransform:
    """Smoothing, then a rotation with random signs.

    Args:
        w: any weight (N, K) of the input; gives K and the device.
        s: smoothing vector (K,) that the input is divided by; None: no smoothing.
        block: channels per Hadamard block; 1: no rotation, and no signs.
        seed: of the signs.
        perm: int (K,), the channel that moves to each position before the rotation; None: as it is.
        num_rotations: block rotations, 1 or 2.
        divisor: round ``s`` to bfloat16 first. Its reciprocal, rounded, is a scale that comes back
            from an engine which stores the divisor: for bfloat16 x, ``1 / (1 / (1 / x))`` is
            ``1 / x``, each division rounded.

    Returns:
        The transform, its scale rounded to bfloat16.
    """
    if divisor and s is not None:
        s = s.to(torch.bfloat16).to(s)
    scale = torch.ones(w.shape[1]) if block == 1 else signs(w.shape[1], seed)
    scale = scale.to(w.device if s is None else s)
    scale = (scale if s is None else scale / s).to(torch.bfloat16)
    return OnlineTransform(scale, block, None if perm is None else perm.int(), num_rotations)
