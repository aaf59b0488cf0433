# SPDX-License-Identifier: Apache-2.0
"""The quantized convolution: weight-only, for autoencoders and U-Nets, where it counts for bytes.

A causal convolution still pads in its own ``forward``. ``weight`` holds the packed integers of the
matrix (O, I * kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.models.linears import CONVOLUTIONS
from dtq.nn.weight_only import WeightOnly


class QuantConv(WeightOnly):
    """A convolution with a packed weight; combined with the class that it replaces."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight (O, I / groups, *kernel), in ``dtype`` or ``compute_dtype``."""
        assert isinstance(self, CONVOLUTIONS)
        kernel = self.in_channels // self.groups, *self.kernel_size
        return self.matrix().unflatten(1, kernel).to(dtype or self.compute_dtype)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # what nn.Conv1d and its like call with their weight, here the packed one
        made: Tensor = super()._conv_forward(x, self.dequantize(x.dtype), bias)  # type: ignore[misc]
        return made
