# SPDX-License-Identifier: Apache-2.0
"""Ops that decode packed weights and multiply in float: references and fakes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dtq.formats import FORMATS


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


WEIGHT_CACHE = WeightCache()
"""The decoded weights of ``cached_linear``."""


def _dequantize(
    tensors: list[Tensor],  # the packed tensors of the weight
    names: list[str],  # their names
    weight_format: str,  # a key of FORMATS
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    packed = dict(zip(names, tensors, strict=True))
    return FORMATS[weight_format].unpack(packed).to(dtype)  # (N, K)


def _dequantize_fake(tensors: list[Tensor], *rest: Any) -> Tensor:
    _, _, columns, dtype = rest
    return tensors[0].new_empty((tensors[0].shape[0], columns), dtype=dtype)


def _weight_linear(x: Tensor, *args: Any) -> Tensor:  # (M, K)
    tensors, names, weight_format, bias = args
    w = torch.ops.dtq.dequantize(tensors, names, weight_format, x.shape[1], x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _cached_linear(x: Tensor, *args: Any) -> Tensor:
    tensors, names, weight_format, bias = args
    w = WEIGHT_CACHE.weight(tensors, names, weight_format, x.shape[1], x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _linear_fake(x: Tensor, tensors: list[Tensor], *rest: object) -> Tensor:
    return x.new_empty((x.shape[0], tensors[0].shape[0]))


_WEIGHT = "Tensor[] tensors, str[] names, str weight_format"
_RESULT = "int columns, ScalarType dtype"

OPS = (
    (f"dequantize({_WEIGHT}, {_RESULT}) -> Tensor", _dequantize, _dequantize_fake),
    (f"weight_linear(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor", _weight_linear, _linear_fake),
    (f"cached_linear(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor", _cached_linear, _linear_fake),
)
"""Schema, reference and fake of each op; rows of the table in ``ops.py``."""
