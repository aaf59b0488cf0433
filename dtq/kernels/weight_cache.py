# SPDX-License-Identifier: Apache-2.0
"""Weights that are kept decoded, for the layers that are too small to gain from int8 on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class WeightCache:
    """Decoded weights, each as long as the packed one that it was made of is there.

    A weight is decoded anew when one of its parts was written to or moved.
    """

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def weight(
        self,
        parts: list[Tensor],
        names: list[str],
        weight_format: str,
        columns: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The float matrix (N, K) in ``dtype``; arguments as of ``dtq::dequantize``."""
        stamp = (dtype, *((part.data_ptr(), _version(part)) for part in parts))
        found = self._known.get(parts[0])
        if found is not None and found[0] == stamp:
            return found[1]
        made: Tensor = torch.ops.dtq.dequantize(parts, names, weight_format, columns, dtype)
        # memory of a graph that is being captured holds the weight only while it is replayed
        if not (made.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._known[parts[0]] = (stamp, made)
        return made

    @property
    def nbytes(self) -> int:
        """What is kept now."""
        return sum(made.nbytes for _, made in self._known.values())


def _version(part: Tensor) -> int:
    return 0 if part.is_inference() else part._version
