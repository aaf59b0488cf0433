# SPDX-License-Identifier: Apache-2.0
"""A cache of decoded weights, for layers that are too small to gain from int8 on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class WeightCache:
    """Decoded weights. Each is kept as long as its first packed tensor exists.

    A weight is decoded again after one of its packed tensors was written to or moved.
    """

    def __init__(self) -> None:
        self._cached = WeakTensorKeyDictionary()

    def weight(
        self,
        tensors: list[Tensor],
        names: list[str],
        weight_format: str,
        columns: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The float weight (N, K), decoded by ``dtq::dequantize`` if it is not in the cache.

        Args:
            tensors: the packed tensors of the weight.
            names: their names, in the same order.
            weight_format: a key of ``FORMATS``.
            columns: K, the input channels.
            dtype: of the result.
        """
        stamp = (dtype, *((tensor.data_ptr(), _version(tensor)) for tensor in tensors))
        entry = self._cached.get(tensors[0])
        if entry is not None and entry[0] == stamp:
            return entry[1]
        weight = torch.ops.dtq.dequantize(tensors, names, weight_format, columns, dtype)
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
