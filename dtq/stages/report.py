# SPDX-License-Identifier: Apache-2.0
"""The report: what was decided and measured while quantizing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dtq.plan.layers import Plan
from dtq.stages.layer_result import InputReport, LayerReport


@dataclass
class Report:
    """Everything that was decided and measured while quantizing.

    Attributes:
        plan: what happened to each layer.
        edges: of the timestep bins of static activation scales.
        calibration: where the statistics are from, how many samples and calls.
        transform_errors: error of the whole model with each transform of ``transform_candidates``.
        allocation: the formats that mixed precision chose.
        finetune: error of each block before and after fine-tuning.
        step_policy: activation precision by part of the trajectory.
        attention: modules with int8 and with float attention, and the error of a step.
        sanity_check: what the short sampling run measured, and the layers that it promoted.
        layers: quantized layers, in model order.
        inputs: input groups.
    """

    plan: Plan = field(default_factory=lambda: Plan("", ()))
    edges: tuple[float, ...] = ()
    calibration: dict[str, Any] = field(default_factory=lambda: {"origin": "none"})
    transform_errors: dict[str, float] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    step_policy: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    sanity_check: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    inputs: list[InputReport] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``dtq_report.json``."""
        decided = {key: value for key, value in vars(self).items() if key != "plan"}
        return {
            "recipe": self.plan.recipe,
            "bits_gemm": self.plan.bits(self.plan.gemm()),
            "bits_all": self.plan.bits(self.plan.quantized()),
            **decided,
            "edges": list(self.edges),
            "layers": [asdict(layer) for layer in self.layers],
            "inputs": [asdict(group) for group in self.inputs],
        }
