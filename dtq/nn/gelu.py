# SPDX-License-Identifier: Apache-2.0
"""GELU: with the quantized linear in front of it, or quick on a CPU.

Behind a linear whose kernel can do it, it is done before the product is rounded. Elsewhere torch
computes its tanh form one slow function call at a time on a CPU; ``dtq::gelu`` gives the same
within 3e-7 of the value, rounded once, and stands between linears, hooks and adapters where GELU
stood.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn

from dtq.nn.linear import QuantLinear


def use_fast_gelu(model: nn.Module) -> None:
    """Let every GELU of the tanh form run with its linear, or as ``dtq::gelu`` on a CPU."""
    for module in model.modules():
        quick = _QUICK.get(type(module))
        if quick is not None and getattr(module, "approximate", "") == "tanh":
            module.__class__ = quick


def _gelu(x: Tensor) -> Tensor | None:
    """None where torch is as good, or knows the gradient."""
    if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        return None
    y: Tensor = torch.ops.dtq.gelu(x)
    return y


class QuickGELU(nn.GELU):
    """``nn.GELU``, tanh form."""

    def forward(self, input: Tensor) -> Tensor:
        y = _gelu(input)
        return super().forward(input) if y is None else y


class QuickProjectedGELU(GELU):  # type: ignore[misc]
    """``diffusers.models.activations.GELU``, tanh form: GELU behind its linear ``proj``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        linear = self.proj
        y = linear.gelu(hidden_states) if isinstance(linear, QuantLinear) else None
        return super().forward(hidden_states) if y is None else y

    def gelu(self, gate: Tensor) -> Tensor:
        y = _gelu(gate)
        if y is None:
            y = super().gelu(gate)
        return y


_QUICK: dict[type, type] = {nn.GELU: QuickGELU, GELU: QuickProjectedGELU}
