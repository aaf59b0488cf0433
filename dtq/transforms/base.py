# SPDX-License-Identifier: Apache-2.0
"""Input transforms: a linear change of a layer's input that its weight undoes.

First law, for every transform ``t``: ``linear(t.x(x), t.w(w))`` equals ``linear(x, w)`` in float64.
Second law: ``t.hessian(x.T @ x)`` equals ``t.x(x).T @ t.x(x)``. So statistics of the raw input
serve every transform, and the model never has to run again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from dtq.linalg.hadamard import rotate, rotate_back


class Transform(Protocol):
    """A linear, invertible change of the K input channels."""

    def x(self, x: Tensor) -> Tensor:
        """The transformed input; float (..., K)."""

    def w(self, w: Tensor) -> Tensor:
        """The weight (N, K) that goes with the transformed input."""

    def hessian(self, h: Tensor) -> Tensor:
        """The Hessian (K, K) of the transformed input, from that of the raw input."""


class _Orthogonal(ABC):
    """An orthogonal transform changes the weight as it changes the input."""

    @abstractmethod
    def x(self, x: Tensor) -> Tensor:
        """The transformed input; float (..., K)."""

    def w(self, w: Tensor) -> Tensor:
        """The weight (N, K) that goes with the transformed input."""
        return self.x(w)

    def hessian(self, h: Tensor) -> Tensor:
        """The Hessian (K, K) of the transformed input."""
        return self.x(self.x(h).T).T


@dataclass(frozen=True)
class Diagonal:
    """Multiply input channel j by ``scale[j]``, divide weight column j by it.

    Attributes:
        scale: float (K,), nowhere zero.
    """

    scale: Tensor

    def x(self, x: Tensor) -> Tensor:
        """The scaled input; float (..., K)."""
        return x * self.scale.to(x)

    def w(self, w: Tensor) -> Tensor:
        """The weight (N, K) that goes with it."""
        return w / self.scale.to(w)

    def hessian(self, h: Tensor) -> Tensor:
        """The Hessian (K, K) of the scaled input."""
        scale = self.scale.to(h)
        return h * scale * scale.unsqueeze(1)


@dataclass(frozen=True)
class Permutation(_Orthogonal):
    """Channel ``perm[j]`` moves to position j.

    Attributes:
        perm: int (K,), a permutation.
    """

    perm: Tensor

    def x(self, x: Tensor) -> Tensor:
        """The permuted input; float (..., K)."""
        return x[..., self.perm.to(x.device, torch.int64)]


@dataclass(frozen=True)
class Rotation(_Orthogonal):
    """A Hadamard transform over blocks of channels; random signs belong to a diagonal before it.

    Attributes:
        block: channels per block, a power of two that divides K.
        num_rotations: 1, or 2: rotate, exchange channels between blocks, rotate (:func:`rotate`).
    """

    block: int
    num_rotations: int = 1

    def x(self, x: Tensor) -> Tensor:
        """The rotated input; float (..., K)."""
        return rotate(x, self.block, self.num_rotations)


@dataclass(frozen=True)
class Chain:
    """Several transforms in a row.

    Attributes:
        steps: the first one is applied first. Empty: the identity.
    """

    steps: tuple[Transform, ...] = ()

    def x(self, x: Tensor) -> Tensor:
        """The transformed input; float (..., K)."""
        return reduce(lambda x, step: step.x(x), self.steps, x)

    def w(self, w: Tensor) -> Tensor:
        """The weight (N, K) that goes with it."""
        return reduce(lambda w, step: step.w(w), self.steps, w)

    def hessian(self, h: Tensor) -> Tensor:
        """The Hessian (K, K) of the transformed input."""
        return reduce(lambda h, step: step.hessian(h), self.steps, h)


@dataclass(frozen=True)
class OnlineTransform:
    """The transform that a layer runs: a diagonal, maybe a permutation, a block rotation.

    Smoothing and the random signs of the rotation share the diagonal: ``scale = sign / s``. The
    file stores it in bfloat16 (``pre_quant_scale``), so it is rounded here, before the weight is
    divided by it.

    Attributes:
        scale: bfloat16 (K,).
        block: channels per Hadamard block, 1 for no rotation.
        perm: int32 (K,), the channel that moves to each position; None: no permutation.
        num_rotations: block rotations, 1 or 2.
    """

    scale: Tensor
    block: int
    perm: Tensor | None = None
    num_rotations: int = 1

    def chain(self) -> Chain:
        """The same as a chain of its steps."""
        perm = () if self.perm is None else (Permutation(self.perm),)
        return Chain((Diagonal(self.scale), *perm, Rotation(self.block, self.num_rotations)))

    def x(self, x: Tensor) -> Tensor:
        """The transformed input; float (..., K)."""
        return self.chain().x(x)

    def w(self, w: Tensor) -> Tensor:
        """The weight (N, K) that goes with it."""
        return self.chain().w(w)

    def hessian(self, h: Tensor) -> Tensor:
        """The Hessian (K, K) of the transformed input."""
        return self.chain().hessian(h)

    def raw(self, v: Tensor) -> Tensor:
        """Rows (R, K) whose product with the raw input is that of ``v`` with the transformed one.

        Inverse of :meth:`w`.
        """
        v = rotate_back(v, self.block, self.num_rotations)
        if self.perm is not None:
            v = v[..., torch.argsort(self.perm.to(v.device, torch.int64))]
        return v * self.scale.to(v)
