# SPDX-License-Identifier: Apache-2.0
"""The gradient of a quantized layer, for adapters that are trained with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dtq.nn.linear import QuantLinear


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of one of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class StraightThrough(torch.autograd.Function):
    """The quantized GEMM, with the gradient of the dequantized layer, which ignores rounding.

    For adapters that are trained with the layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantLinear) -> Tensor:
        """``x`` (M, K) through the layer, (M, N)."""
        ctx.layer, ctx.has_bias = layer, bias is not None
        return layer._gemm(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Gradients of ``x`` (M, K) and of the bias (N,), with the dequantized weight."""
        (grad,) = grads  # (M, N)
        x_grad = grad @ ctx.layer.dequantize(grad.dtype)  # (M, K)
        return x_grad, grad.sum(0) if ctx.has_bias else None, None
