# SPDX-License-Identifier: Apache-2.0
"""The gradient of a quantized linear, for adapters that are trained with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dtq.nn.linear import QuantLinear


def straight_through(x: Tensor, bias: Tensor | None, layer: QuantLinear) -> Tensor:
    """The quantized GEMM, (M, K) to (M, N), with the gradient of the dequantized layer.

    The gradient ignores rounding (straight-through estimator).
    """
    y: Tensor = _StraightThrough.apply(x, bias, layer)  # type: ignore[no-untyped-call]
    return y


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantLinear) -> Tensor:
        ctx.layer, ctx.has_bias = layer, bias is not None
        return layer._gemm(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads  # (M, N)
        x_grad = grad @ ctx.layer.dequantize(grad.dtype)  # (M, K)
        return x_grad, grad.sum(0) if ctx.has_bias else None, None
