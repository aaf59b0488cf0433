# SPDX-License-Identifier: Apache-2.0
"""The gradient of a quantized linear, for adapters that are trained with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dtq.nn.linear import QuantLinear


class StraightThrough(torch.autograd.Function):
    """The quantized GEMM, with the gradient of the dequantized layer: rounding is ignored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantLinear) -> Tensor:
        """(M, K) to (M, N)."""
        ctx.layer, ctx.has_bias = layer, bias is not None
        return layer._gemm(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Gradients of ``x`` (M, K) and of the bias (N,)."""
        (grad,) = grads  # (M, N)
        x_grad = grad @ ctx.layer.dequantize(grad.dtype)  # (M, K)
        return x_grad, grad.sum(0) if ctx.has_bias else None, None
