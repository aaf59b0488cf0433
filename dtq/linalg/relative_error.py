# SPDX-License-Identifier: Apache-2.0
"""The relative squared error of one tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(output: Tensor, reference: Tensor) -> float:
    """``|output - reference|^2 / |reference|^2`` in float64; inf if ``output`` is not finite."""
    if not torch.isfinite(output).all():
        return float("inf")
    difference = output.double() - reference.double()
    return float(difference.square().sum() / reference.double().square().sum().clamp(min=1e-300))
