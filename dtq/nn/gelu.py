# SPDX-License-Identifier: Apache-2.0
"""GELU, tanh form: as the epilogue of a quantized linear, or as a fast op on a CPU.

If the kernel of the linear before it supports the epilogue, GELU is applied before the output is
rounded. Elsewhere on a CPU, torch computes the tanh form with one slow function call per value;
``dtq::gelu`` gives the same within 3e-7 of the value, rounded once.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn

from dtq.nn.linear import QuantLinear


def use_fast_gelu(model: nn.Module) -> None:
    """Replace the class of every GELU of the tanh form by :class:`FastGELU` or its variant."""
    for module in model.modules():
        fast = _FAST.get(type(module))
        if fast is not None and getattr(module, "approximate", "") == "tanh":
            module.__class__ = fast


def _gelu(x: Tensor) -> Tensor | None:
    """The op; None where torch is as fast, or a gradient is required."""
    if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        return None
    y: Tensor = torch.ops.dtq.gelu(x)
    return y


class FastGELU(nn.GELU):
    """``nn.GELU``, tanh form."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply GELU to a tensor of any shape."""
        y = _gelu(input)
        return super().forward(input) if y is None else y


class FastProjectedGELU(GELU):  # type: ignore[misc]
    """``diffusers.models.activations.GELU``, tanh form: the linear ``proj``, then GELU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        linear = self.proj
        fuse = isinstance(linear, QuantLinear) and "gelu" not in vars(self)
        y = linear.gelu(hidden_states) if fuse else None
        return super().forward(hidden_states) if y is None else y

    def gelu(self, gate: Tensor) -> Tensor:
        """Apply GELU to the output of ``proj``."""
        y = _gelu(gate)
        return super().gelu(gate) if y is None else y


_FAST: dict[type, type] = {nn.GELU: FastGELU, GELU: FastProjectedGELU}
