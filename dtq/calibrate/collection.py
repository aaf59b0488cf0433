# SPDX-License-Identifier: Apache-2.0
"""What calibration collects of one model: statistics per input, timestep bins, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dtq.calibrate.observers import InputStats
from dtq.errors import InputError


@dataclass
class Statistics:
    """Everything one calibration run remembers.

    Attributes:
        sites: by site name.
        edges: timesteps that separate the bins, rising.
        about: how it was made: model class, set, samples, steps, seed, parts.
    """

    inputs: Mapping[str, InputStats]
    edges: tuple[float, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def merge(self, other: Statistics) -> None:
        """Take in what another run on the same model saw.

        Raises:
            InputError: other sites or bins.
        """
        if self.edges != other.edges or set(self.inputs) != set(other.inputs):
            raise InputError("statistics of different models or bins cannot be merged")
        self.inputs = dict(self.inputs)  # of a file they would be read anew
        if "calls" in self.about and "calls" in other.about:
            self.about = {**self.about, "calls": self.about["calls"] + other.about["calls"]}
        for name, stats in self.inputs.items():
            stats.merge(other.inputs[name])
