# SPDX-License-Identifier: Apache-2.0
"""Casts and ``requires_grad_`` of a quantized model: they apply to what is not quantized.

diffusers refuses ``to(dtype)``, ``half()`` and ``float()`` for every quantized model, and calls
them itself in ``from_pipe`` and ``save_lora_adapter``. Packed tensors of dtq are integers, which
casts between float dtypes leave alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dtq.checkpoint.config import is_dtq
from dtq.nn.storage import cast_dtype


def register() -> None:
    """Let the models of dtq be cast."""
    if hasattr(ModelMixin.to, "dtq"):
        return
    for name in ("to", "half", "float"):
        setattr(ModelMixin, name, _allowed(getattr(ModelMixin, name)))
    ModelMixin._apply = _apply
    ModelMixin.requires_grad_ = _requires_grad_


def _config(model: nn.Module) -> Any:
    """The quantization config of a model that dtq has quantized; None for any other."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config if is_dtq(config) else None


def _allowed(cast: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(cast)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _config(self) is None:
            return cast(self, *args, **kwargs)
        self.is_quantized = False
        try:
            return cast(self, *args, **kwargs)
        finally:
            self.is_quantized = True

    method.dtq = True  # type: ignore[attr-defined]
    return method


def _requires_grad_(self: Any, requires_grad: bool = True) -> Any:
    """``nn.Module.requires_grad_``; packed tensors are integers, and never require gradients."""
    if _config(self) is None:
        return nn.Module.requires_grad_(self, requires_grad)
    for parameter in self.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(requires_grad)
    return self


def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """``nn.Module._apply``, through which every cast goes; a later save records the dtype.

    Raises:
        InputError: packed tensors would be cast; nothing has been.
    """
    config = _config(self)
    if config is not None:
        config.compute_dtype = cast_dtype(fn, config.compute_dtype or torch.float32)
    return nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
