# SPDX-License-Identifier: Apache-2.0
"""Quantized layers of several options, built when they are asked for: never two options at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from dtq.nn.step_clock import StepClock
from dtq.stages.layer_result import LayerResult
from dtq.stages.solve import build_quant_linear

RECORDED_SAMPLES = 4  # pictures whose sampling by the float model is recorded, to compare with


NUM_INPUTS = 24  # recorded calls that whole-model alternatives are judged on


class CandidateLayers(Mapping[str, dict[str, nn.Module]]):
    """Option to the quantized linears by name, built when looked up: never two options at once.

    Args:
        model: the float model that they will stand in; its clock tells them the time.
        options: option to solved layers.
        bins: timestep bins of static scales.
        clock: of the model, None without one.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Mapping[str, Mapping[str, LayerResult]],
        bins: int,
        clock: StepClock | None,
    ) -> None:
        self.model, self.options, self.bins, self.clock = model, options, bins, clock

    def __getitem__(self, option: str) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for name, result in self.options[option].items():
            old = self.model.get_submodule(name)
            new = build_quant_linear(result, old, self.bins, next(old.parameters()).dtype)
            new.set_clock(self.clock)
            modules[name] = new
        return modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.options)

    def __len__(self) -> int:
        return len(self.options)
