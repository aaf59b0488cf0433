# SPDX-License-Identifier: Apache-2.0
"""Changes that cancel: what is done to the input of a linear is undone in its weight.

Law, for every transform ``t``: ``linear(t.x(x), t.w(w))`` equals ``linear(x, w)`` in float64.
Second law: ``t.gram(x.T @ x)`` equals ``t.x(x).T @ t.x(x)``, so that statistics of the raw input
serve every transform and the model never has to run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtq.transforms.hadamard import fwht


class Transform(Protocol):
    """A linear, invertible change of the input channels."""

    def x(self, x: Tensor) -> Tensor:
        """The changed input; float (..., K)."""

    def w(self, w: Tensor) -> Tensor:
        """The weight (N, K) that goes with the changed input."""

    def gram(self, h: Tensor) -> Tensor:
        """Second moment (K, K) of the changed input."""


@dataclass(frozen=True)
class Diagonal:
    """Multiply input channel j by ``scale[j]``, divide weight column j by it; scale: (K,)."""

    scale: Tensor

    def x(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x)

    def w(self, w: Tensor) -> Tensor:
        return w / self.scale.to(w)

    def gram(self, h: Tensor) -> Tensor:
        scale = self.scale.to(h)
        return h * scale * scale.unsqueeze(1)


@dataclass(frozen=True)
class Rotation:
    """Hadamard over blocks of ``block`` channels; random signs go into a diagonal before it."""

    block: int

    def x(self, x: Tensor) -> Tensor:
        return fwht(x, self.block)

    def w(self, w: Tensor) -> Tensor:
        return fwht(w, self.block)

    def gram(self, h: Tensor) -> Tensor:
        return fwht(fwht(h, self.block).T, self.block).T


@dataclass(frozen=True)
class Chain:
    """Several transforms, the first one first. Empty: the identity."""

    steps: tuple[Transform, ...] = ()

    def x(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step.x(x)
        return x

    def w(self, w: Tensor) -> Tensor:
        for step in self.steps:
            w = step.w(w)
        return w

    def gram(self, h: Tensor) -> Tensor:
        for step in self.steps:
            h = step.gram(h)
        return h


@dataclass(frozen=True)
class Online:
    """The form that a layer runs: one diagonal, then one block rotation.

    Smoothing and the random signs of the rotation share the diagonal: ``scale = sign / s``. It is
    what the file keeps (``pre_quant_scale``, bfloat16), so it is rounded here, before the weight
    is divided by it.
    """

    scale: Tensor
    block: int

    @classmethod
    def of(cls, smoothing: Tensor, sign: Tensor, block: int) -> Online:
        """From smoothing ``s`` (K,) that divides the input, signs (K,), and a Hadamard block."""
        return cls((sign.to(smoothing) / smoothing).to(torch.bfloat16), block)

    def chain(self) -> Chain:
        return Chain((Diagonal(self.scale), Rotation(self.block)))

    def x(self, x: Tensor) -> Tensor:
        return self.chain().x(x)

    def w(self, w: Tensor) -> Tensor:
        return self.chain().w(w)

    def gram(self, h: Tensor) -> Tensor:
        return self.chain().gram(h)
