# SPDX-License-Identifier: Apache-2.0
"""A cache of decoded weights, for layers that are too small to gain from int8 on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dtq.linalg.hadamard import rotate_back


@dataclass(frozen=True)
class InputTransform:
    """The input transform of a layer, as ops take it.

    Attributes:
        pre_scale: bfloat16 (K,), multiplied with the channels; None for none.
        perm: int32 (K,), the channel that moves to each place; None for none.
        hadamard_block: channels of a Hadamard block; 1: no rotation.
        num_rotations: 1, or 2 with the blocks transposed in between.
    """

    pre_scale: Tensor | None
    perm: Tensor | None
    hadamard_block: int
    num_rotations: int

    @property
    def is_identity(self) -> bool:
        """Whether the transformed input is the input."""
        return self.pre_scale is None and self.perm is None and self.hadamard_block == 1

    def tensors(self) -> list[Tensor]:
        """Those that are not None."""
        return [tensor for tensor in (self.pre_scale, self.perm) if tensor is not None]

    def fold(self, w: Tensor) -> Tensor:
        """The weight whose product with the input is that of ``w`` with the transformed input.

        With T(x) = R P diag(s) x it is W R P diag(s): rotations of float32 rows, and a product with
        each column.

        Args:
            w: float32 (N, K).
        """
        w = rotate_back(w, self.hadamard_block, self.num_rotations)
        if self.perm is not None:
            w = w[:, torch.argsort(self.perm.long())]
        return w if self.pre_scale is None else w * self.pre_scale.float()


class WeightCache:
    """Decoded weights, with the input transform of their layer folded in.

    Each is kept as long as its first packed tensor exists. It is made again after a tensor of the
    weight or of the transform was written to, moved or replaced.
    """

    def __init__(self) -> None:
        self._cached = WeakTensorKeyDictionary()

    def weight(
        self,
        tensors: list[Tensor],
        names: list[str],
        weight_format: str,
        transform: InputTransform,
        columns: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The float weight (N, K) for the untransformed input, made if it is not in the cache.

        It is decoded by ``dtq::dequantize`` and rounded to ``dtype`` once: after the transform, if
        there is one.

        Args:
            tensors: the packed tensors of the weight.
            names: their names, in the same order.
            weight_format: a key of ``FORMATS``.
            transform: of the input.
            columns: K, the input channels.
            dtype: of the result.
        """
        read = [*tensors, *transform.tensors()]
        stamp = (
            dtype,
            transform.hadamard_block,
            transform.num_rotations,
            *((tensor.data_ptr(), _version(tensor)) for tensor in read),
        )
        entry = self._cached.get(tensors[0])
        if entry is not None and entry[0] == stamp:
            return entry[1]
        decoded = dtype if transform.is_identity else torch.float32
        weight = torch.ops.dtq.dequantize(tensors, names, weight_format, columns, decoded)
        if not transform.is_identity:
            weight = transform.fold(weight).to(dtype)
        # while a graph is captured, its memory holds the weight only during replays
        if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._cached[tensors[0]] = (stamp, weight)
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in the cache."""
        return sum(weight.nbytes for _, weight in self._cached.values())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
