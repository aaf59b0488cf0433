# SPDX-License-Identifier: Apache-2.0
"""Packed tensors in memory: integer views of float bits, at aligned addresses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dtq.errors import CheckpointError, InputError
from dtq.formats import TensorSpec
from dtq.plan.layers import check_compute_dtype

BIT_TYPES = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float8_e4m3fn: torch.int8,
}
"""Float dtype to the integer dtype that holds its bits in a module."""


def check_tensor(key: str, tensor: Tensor, spec: TensorSpec) -> None:
    """Check shape and dtype of a packed tensor.

    Raises:
        CheckpointError: they are not those of the spec.
    """
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        raise CheckpointError(
            f"{key}: expected {spec.dtype} {list(spec.shape)}, "
            f"the file has {tensor.dtype} {list(tensor.shape)}"
        )


def from_disk(tensor: Tensor) -> Tensor:
    """The bits of a float tensor as integers; integers unchanged."""
    bits = BIT_TYPES.get(tensor.dtype)
    return tensor.contiguous().view(bits) if bits is not None else tensor.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of 64, copied if necessary.

    Tensors of a memory-mapped file start at any address, and float kernels round differently there.
    Without alignment a loaded model would not be bit-identical to the saved one.
    """
    ready = tensor.device.type != "cpu" or tensor.data_ptr() % 64 == 0
    return tensor if ready else tensor.clone()


def to_disk(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """Inverse of :func:`from_disk`, sharing memory."""
    return tensor.view(spec.dtype) if spec.dtype in BIT_TYPES else tensor


def device_of(module: nn.Module) -> torch.device:
    """Device of the first parameter; the CPU for a module without parameters."""
    return next(module.parameters(), torch.empty(0)).device


def cast_dtype(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> torch.dtype:
    """What a function that ``nn.Module._apply`` gets makes of a compute dtype.

    Raises:
        InputError: the function casts integers, and would destroy packed tensors; or the result is
            no compute dtype.
    """
    if fn(torch.empty(0, dtype=torch.int8)).dtype != torch.int8:
        raise InputError(
            "this cast would change the packed tensors of quantized layers; to(dtype), half() and "
            "float() cast what is not quantized"
        )
    made = fn(torch.empty(0, dtype=dtype)).dtype
    check_compute_dtype(made)
    return made
