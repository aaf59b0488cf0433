# SPDX-License-Identifier: Apache-2.0
"""Quantized layers of several options, built when they are looked up: one option at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from dtq.allocate.measure import Measured, measure
from dtq.nn.step_clock import StepClock
from dtq.nn.timestep_hook import install_clock
from dtq.pipelines.recorded_calls import subsample
from dtq.stages.layer_result import LayerResult
from dtq.stages.run import Run
from dtq.stages.solve import build_quant_linear

NUM_INPUTS = 24
"""Recorded inputs that alternatives of the whole model are evaluated on."""

Options = Mapping[str, Mapping[str, LayerResult]]
"""Option name to solved layers by name."""


@dataclass(frozen=True)
class CandidateLayers(Mapping[str, dict[str, nn.Module]]):
    """Option name to quantized linears by layer name.

    Attributes:
        run: the run whose float model the linears stand in.
        options: solved layers of each option.
        clock: step clock of the float model, None without static scales per timestep.
    """

    run: Run
    options: Options
    clock: StepClock | None

    def __getitem__(self, option: str) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for name, result in self.options[option].items():
            old = self.run.model.get_submodule(name)
            dtype = next(old.parameters()).dtype
            new = build_quant_linear(result, old, self.run.plan.bins, dtype)
            new.set_clock(self.clock, name)
            modules[name] = new
        return modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.options)

    def __len__(self) -> int:
        return len(self.options)


def measure_candidates(
    run: Run, items: Mapping[str, Options], num_inputs: int, what: str
) -> Measured:
    """Errors of the options of each item, see :func:`dtq.allocate.measure.measure`.

    Args:
        run: a run whose model is still float; its step clock is installed.
        items: solved layers by item and option.
        num_inputs: recorded inputs to measure on.
        what: of the progress bar.
    """
    clock = install_clock(run.model, run.edges) if run.edges else None
    layers = {item: CandidateLayers(run, options, clock) for item, options in items.items()}
    calls = subsample(run.recorded, num_inputs)
    return measure(run.model, calls, layers, progress=run.progress, what=what, tasks=run.tasks)
