# SPDX-License-Identifier: Apache-2.0
"""Packed tensors as a module holds them: integer views of float bits, aligned memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtq.errors import CheckpointError
from dtq.formats import TensorSpec

_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float8_e4m3fn: torch.int8,
}


def check_part(key: str, tensor: Tensor, spec: TensorSpec) -> None:
    """Raise :class:`CheckpointError` unless the tensor is as the spec says."""
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        raise CheckpointError(
            f"{key}: expected {spec.dtype} {list(spec.shape)}, "
            f"the file has {tensor.dtype} {list(tensor.shape)}"
        )


def from_disk(tensor: Tensor) -> Tensor:
    """The bits of a float tensor as integers; integers as they are."""
    bits = _BITS.get(tensor.dtype)
    return tensor.contiguous().view(bits) if bits is not None else tensor.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of 64, copied if it must be.

    Tensors of a mapped file begin anywhere, and float kernels round differently there: without
    this a loaded model is not bit-identical to the one that was saved.
    """
    ready = tensor.device.type != "cpu" or tensor.data_ptr() % 64 == 0
    return tensor if ready else tensor.clone()


def to_disk(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """Inverse of :func:`from_disk`, sharing memory."""
    return tensor.view(spec.dtype) if spec.dtype in _BITS else tensor


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters(), torch.empty(0)).device
