# SPDX-License-Identifier: Apache-2.0
"""The input transform of a layer: a linear change of its input that its weight undoes.

First law: ``linear(t.x(x), t.w(w))`` equals ``linear(x, w)`` in float64. Second law:
``t.hessian(x.T @ x)`` equals ``t.x(x).T @ t.x(x)``. So statistics of the raw input serve every
transform, and the model never has to run again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.linalg.hadamard import rotate, rotate_back


@dataclass(frozen=True)
class OnlineTransform:
    """The transform that a layer runs: a diagonal, maybe a permutation, a block rotation.

    The diagonal multiplies input channel j by ``scale[j]``, and divides weight column j by it. The
    other two are orthogonal: they change the weight as they change the input.

    Smoothing and the random signs of the rotation share the diagonal: ``scale = sign / s``. The
    file stores it in bfloat16 (``pre_quant_scale``), so it is rounded here, before the weight is
    divided by it.

    Attributes:
        scale: bfloat16 (K,), nowhere zero.
        block: channels per Hadamard block, a power of two that divides K; 1 for no rotation.
        perm: int32 (K,), channel ``perm[j]`` moves to position j; None: no permutation.
        num_rotations: 1, or 2: rotate, exchange channels between blocks, rotate (:func:`rotate`).
    """

    scale: Tensor
    block: int
    perm: Tensor | None = None
    num_rotations: int = 1

    def x(self, x: Tensor) -> Tensor:
        """The transformed input; float (..., K)."""
        return self._rotated(x * self.scale.to(x))

    def w(self, w: Tensor) -> Tensor:
        """The weight (N, K) that goes with the transformed input."""
        return self._rotated(w / self.scale.to(w))

    def hessian(self, h: Tensor) -> Tensor:
        """The Hessian (K, K) of the transformed input, from that of the raw input."""
        scale = self.scale.to(h)
        scaled = h * scale * scale.unsqueeze(1)
        return self._rotated(self._rotated(scaled).T).T

    def _rotated(self, x: Tensor) -> Tensor:
        """The orthogonal part, along the last axis."""
        if self.perm is not None:
            x = x[..., self.perm.to(x.device, torch.int64)]
        return rotate(x, self.block, self.num_rotations)

    def raw(self, v: Tensor) -> Tensor:
        """Rows (R, K) whose product with the raw input is that of ``v`` with the transformed one.

        Inverse of :meth:`w`.
        """
        v = rotate_back(v, self.block, self.num_rotations)
        if self.perm is not None:
            v = v[..., torch.argsort(self.perm.to(v.device, torch.int64))]
        return v * self.scale.to(v)
