# SPDX-License-Identifier: Apache-2.0
"""Changes that cancel: what is done to the input of a linear is undone in its weight.

Law, for every transform ``t``: ``linear(t.x(x), t.w(w))`` equals ``linear(x, w)`` in float64.
Second law: ``t.hessian(x.T @ x)`` equals ``t.x(x).T @ t.x(x)``, so that statistics of the raw input
serve every transform and the model never has to run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtq.linalg.hadamard import rotate, rotate_back


class Transform(Protocol):
    """A linear, invertible change of the input channels."""

    def x(self, x: Tensor) -> Tensor:
        """The changed input; float (..., K)."""

    def w(self, w: Tensor) -> Tensor:
        """The weight (N, K) that goes with the changed input."""

    def hessian(self, h: Tensor) -> Tensor:
        """Second moment (K, K) of the changed input."""


@dataclass(frozen=True)
class Diagonal:
    """Multiply input channel j by ``scale[j]``, divide weight column j by it; scale: (K,)."""

    scale: Tensor

    def x(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x)

    def w(self, w: Tensor) -> Tensor:
        return w / self.scale.to(w)

    def hessian(self, h: Tensor) -> Tensor:
        scale = self.scale.to(h)
        return h * scale * scale.unsqueeze(1)


@dataclass(frozen=True)
class Permutation:
    """Channel ``order[j]`` moves to place j; order: int (K,)."""

    perm: Tensor

    def x(self, x: Tensor) -> Tensor:
        return x[..., self.perm.to(x.device, torch.int64)]

    def w(self, w: Tensor) -> Tensor:
        return self.x(w)

    def hessian(self, h: Tensor) -> Tensor:
        return self.x(self.x(h).T).T


@dataclass(frozen=True)
class Rotation:
    """Hadamard over blocks of ``block`` channels; random signs go into a diagonal before it.

    Two ``num_rotations`` rotate twice, the blocks exchanging channels in between (:func:`rotate`).
    """

    block: int
    num_rotations: int = 1

    def x(self, x: Tensor) -> Tensor:
        return rotate(x, self.block, self.num_rotations)

    def w(self, w: Tensor) -> Tensor:
        return self.x(w)

    def hessian(self, h: Tensor) -> Tensor:
        return self.x(self.x(h).T).T


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

    def hessian(self, h: Tensor) -> Tensor:
        for step in self.steps:
            h = step.hessian(h)
        return h


@dataclass(frozen=True)
class OnlineTransform:
    """The form that a layer runs: a diagonal, a permutation if there is one, a block rotation.

    Smoothing and the random signs of the rotation share the diagonal: ``scale = sign / s``. It is
    what the file keeps (``pre_quant_scale``, bfloat16), so it is rounded here, before the weight
    is divided by it.

    Attributes:
        scale: bfloat16 (K,).
        block: Hadamard block, 1 for none.
        order: int32 (K,), the channel that moves to each place; None leaves them.
        num_rotations: block rotations, 1 or 2.
    """

    scale: Tensor
    block: int
    perm: Tensor | None = None
    num_rotations: int = 1

    @classmethod
    def of(
        cls,
        smoothing: Tensor,
        sign: Tensor,
        block: int,
        perm: Tensor | None = None,
        num_rotations: int = 1,
    ) -> OnlineTransform:
        """From smoothing ``s`` (K,) that divides the input, signs (K,), and the rotation."""
        scale = (sign.to(smoothing) / smoothing).to(torch.bfloat16)
        return cls(scale, block, None if perm is None else perm.to(torch.int32), num_rotations)

    def chain(self) -> Chain:
        order = () if self.perm is None else (Permutation(self.perm),)
        return Chain((Diagonal(self.scale), *order, Rotation(self.block, self.num_rotations)))

    def x(self, x: Tensor) -> Tensor:
        return self.chain().x(x)

    def w(self, w: Tensor) -> Tensor:
        return self.chain().w(w)

    def hessian(self, h: Tensor) -> Tensor:
        return self.chain().hessian(h)

    def raw(self, v: Tensor) -> Tensor:
        """Rows ``v`` (R, K) that read the changed input, as rows that read the raw one."""
        v = rotate_back(v, self.block, self.num_rotations)
        if self.perm is not None:
            v = v[..., torch.argsort(self.perm.to(v.device, torch.int64))]
        return v * self.scale.to(v)
