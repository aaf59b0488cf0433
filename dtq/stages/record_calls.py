# SPDX-License-Identifier: Apache-2.0
"""Stage: record inputs and outputs of the float model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dtq.io.memory import paged_weights
from dtq.pipelines.loading import LoadedModel, modules_of
from dtq.pipelines.recorded_calls import RecordedCall
from dtq.pipelines.recording import sample_calls
from dtq.recipe.resolve import Recipe
from dtq.stages.candidates import RECORDED_SAMPLES


def record_calls(
    loaded: LoadedModel, recipe: Recipe, calls: Sequence[dict[str, Any]] | None
) -> list[RecordedCall]:
    """One sampling run of the float model, for the stages that compare with it."""
    needed = (
        recipe.allocate.budget or recipe.step_policy.precisions or recipe.finetune.name != "none"
    )
    # made-up inputs would say little about which transform is better
    wanted = recipe.transform_candidates and (loaded.pipeline is not None or calls is not None)
    if not needed and not wanted:
        return []
    with paged_weights(*modules_of(loaded)):
        return sample_calls(loaded, recipe.calibration, RECORDED_SAMPLES, inputs=calls)
