# SPDX-License-Identifier: Apache-2.0
"""What a pipeline holds in memory while one of its models is calibrated, before a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dtq.errors import InputError
from dtq.estimate.sampling import sampling_memory
from dtq.estimate.size import resident_weights
from dtq.pipelines.settings import SamplingSettings


@dataclass(frozen=True)
class CalibratingMemory:
    """Bytes while a pipeline samples for the calibration.

    Attributes:
        weights: that are resident, of each model.
        activations: and weights that a model computes with, at the peak of a batch.
    """

    weights: dict[str, int]
    activations: int

    def around(self, component: str) -> int:
        """All but the weights of one model, which is the one that is calibrated."""
        return sum(self.weights.values()) - self.weights.get(component, 0) + self.activations


def calibrating_memory(
    pipeline: Any, settings: SamplingSettings, dtype: torch.dtype, *, mapped: bool
) -> CalibratingMemory | None:
    """Estimate it from a run without weights; None for a pipeline that cannot make one.

    ``dtq plan`` says why it cannot, where it shows the memory while sampling.

    Args:
        pipeline: float, with models on the meta device; they are cast to ``dtype``.
        settings: of the calibration; two steps are taken, as all are alike, and one batch.
        dtype: compute dtype.
        mapped: see :func:`~dtq.estimate.size.resident_weights`.
    """
    few = replace(settings, samples=settings.batch_size, steps=2)
    weights = {
        name: resident_weights(model, dtype, mapped=mapped)
        for name, model in pipeline.components.items()
        if isinstance(model, nn.Module)
    }
    try:
        found = sampling_memory(pipeline, few, dtype)
    except InputError:
        return None
    return CalibratingMemory(weights, found.modes["none"] - sum(found.weights.values()))
