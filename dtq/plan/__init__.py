# SPDX-License-Identifier: Apache-2.0
"""What happens to each layer: formats, transforms, and precision per timestep."""

from dtq.plan.layers import CheckpointSpec, LayerPlan, LayerSpec, Plan
from dtq.plan.step_policy import StepPolicy

__all__ = ["CheckpointSpec", "LayerPlan", "LayerSpec", "Plan", "StepPolicy"]
