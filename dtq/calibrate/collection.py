# SPDX-License-Identifier: Apache-2.0
"""The statistics of one model: observers per input group, timestep bins, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dtq.calibrate.gradients import output_parts
from dtq.calibrate.observers import HessianObserver, InputStats
from dtq.errors import InputError


@dataclass
class Statistics:
    """The result of a calibration run.

    Attributes:
        inputs: statistics by name of the input group, or of the part of an output whose gradients
            were observed.
        edges: timesteps that separate the bins, rising.
        about: how they were made: model class, prompt set, samples, steps, seed, shards.
    """

    inputs: Mapping[str, InputStats]
    edges: tuple[float, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def gradients(self, layer: str, outputs: int) -> list[HessianObserver]:
        """Second moments of the gradients of a linear with N outputs, a part of these each.

        They are empty where none were collected, or where the outputs do not reach that of the
        model.
        """
        stats = [self.inputs.get(part.name) for part in output_parts(layer, outputs)]
        moments = [x.hessian for x in stats if x is not None and x.hessian is not None]
        seen = len(moments) == len(stats) and all(int(x.count) for x in moments)
        return moments if seen else []

    def merge(self, other: Statistics) -> None:
        """Add the statistics of another run on the same model.

        Raises:
            InputError: they have other input groups or bins.
        """
        if self.edges != other.edges or set(self.inputs) != set(other.inputs):
            raise InputError("statistics of different models or bins cannot be merged")
        self.inputs = dict(self.inputs)  # those of a file would be read again at every access
        if "calls" in self.about and "calls" in other.about:
            self.about = {**self.about, "calls": self.about["calls"] + other.about["calls"]}
        for name, stats in self.inputs.items():
            stats.merge(other.inputs[name])
