# SPDX-License-Identifier: Apache-2.0
"""Stage: record inputs and outputs of the float model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dtq.io.memory import paged
from dtq.pipelines.loading import Source, _modules
from dtq.pipelines.recorded_calls import Recorded
from dtq.pipelines.recording import sample_calls
from dtq.recipe.resolve import Recipe
from dtq.stages.candidates import RECORDED


def _record(
    source: Source, recipe: Recipe, calls: Sequence[dict[str, Any]] | None
) -> list[Recorded]:
    """One sampling run of the float model, for the stages that compare with it."""
    needed = recipe.allocate.budget or recipe.steps.modes or recipe.refine.name != "none"
    # made-up inputs would say little about which transform is better
    wanted = recipe.compare and (source.pipeline is not None or calls is not None)
    if not needed and not wanted:
        return []
    with paged(*_modules(source)):
        return sample_calls(source, recipe.calibration, RECORDED, inputs=calls)
