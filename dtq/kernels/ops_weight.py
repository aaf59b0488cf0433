# SPDX-License-Identifier: Apache-2.0
"""Ops that decode packed weights, or take float ones, and multiply in float: references, fakes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dtq.formats import FORMATS
from dtq.kernels.ops_quantize import TRANSFORM_ARGS
from dtq.kernels.weight_cache import InputTransform, WeightCache

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


def _dequantize_fake(
    tensors: list[Tensor], names: list[str], weight_format: str, columns: int, dtype: torch.dtype
) -> Tensor:
    return tensors[0].new_empty((tensors[0].shape[0], columns), dtype=dtype)


def _weight_linear(
    x: Tensor,  # (M, K)
    tensors: list[Tensor],
    names: list[str],
    weight_format: str,
    bias: Tensor | None,
) -> Tensor:
    w = torch.ops.dtq.dequantize(tensors, names, weight_format, x.shape[1], x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _cached_linear(
    x: Tensor,  # (M, K), before the input transform
    tensors: list[Tensor],
    names: list[str],
    weight_format: str,
    pre_scale: Tensor | None,  # of InputTransform, and the next three
    perm: Tensor | None,
    hadamard_block: int,
    num_rotations: int,
    bias: Tensor | None,
) -> Tensor:
    transform = InputTransform(pre_scale, perm, hadamard_block, num_rotations)
    w = WEIGHT_CACHE.weight(tensors, names, weight_format, transform, x.shape[1], x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))  # (M, K), (N, K)


def _float_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _linear_fake(x: Tensor, tensors: list[Tensor], *rest: object) -> Tensor:
    return x.new_empty((x.shape[0], tensors[0].shape[0]))


_WEIGHT = "Tensor[] tensors, str[] names, str weight_format"
_RESULT = "int columns, ScalarType dtype"

OPS = (
    (f"dequantize({_WEIGHT}, {_RESULT}) -> Tensor", _dequantize, _dequantize_fake),
    (f"weight_linear(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor", _weight_linear, _linear_fake),
    (
        "float_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        _float_linear,
        _float_linear_fake,
    ),
    (
        f"cached_linear(Tensor x, {_WEIGHT}, {TRANSFORM_ARGS}, Tensor? bias) -> Tensor",
        _cached_linear,
        _linear_fake,
    ),
)
"""Schema, reference and fake of each op; rows of the table in ``ops.py``."""
