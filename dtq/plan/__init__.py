# SPDX-License-Identifier: Apache-2.0
"""What happens to each layer: formats, transforms, and precision per timestep."""

from dtq.plan.layers import LayerPlan, LayerSpec, Plan

__all__ = ["LayerPlan", "LayerSpec", "Plan"]
