# SPDX-License-Identifier: Apache-2.0
"""The quantized linear, and how it replaces the float linears of a model."""

from dtq.nn.linear import QuantLinear
from dtq.nn.step_clock import StepClock

__all__ = ["QuantLinear", "StepClock"]
