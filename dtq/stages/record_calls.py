# SPDX-License-Identifier: Apache-2.0
"""Stage: record inputs and outputs of the float model."""

from __future__ import annotations

from dtq.errors import InputError
from dtq.io.memory import paged_weights
from dtq.models import is_text_encoder
from dtq.pipelines.loading import modules_of
from dtq.pipelines.recording import sample_calls
from dtq.pipelines.sampling import never_called
from dtq.stages.run import Run

RECORDED_SAMPLES = 4
"""Images whose sampling by the float model is recorded, to compare with."""


def record_calls(run: Run) -> None:
    """Record one sampling run of the float model, if a later stage compares with it.

    Of a text encoder whose forward the pipeline never calls, because it runs its layers one by one,
    nothing is recorded, and :func:`dtq.stages.compare_transforms` says so.

    Raises:
        InputError: the pipeline never calls the model in that run.
    """
    recipe, loaded = run.recipe, run.loaded
    if run.shares_budget and loaded.pipeline is not None:
        return  # recorded with the other models of the pipeline
    finetuned = recipe.finetune.name != "none"
    needed = run.formats or recipe.step_policy.precisions or finetuned
    needed = needed or recipe.attention == "int8"
    # random inputs would say little about which transform is better
    if needed or (recipe.transform_candidates and run.has_data):
        with paged_weights(*modules_of(loaded)):
            calls = sample_calls(loaded, recipe.calibration, RECORDED_SAMPLES, inputs=run.inputs)
        if not calls and not is_text_encoder(loaded.model):
            raise never_called(loaded, recipe.calibration)
        if not calls and needed:
            raise InputError(
                f"{type(loaded.pipeline).__name__} runs the layers of {loaded.component} one by "
                f"one and never its forward, with which the recipe {recipe.name} compares: take "
                f"one without finetune and allocate for it, such as w4a16"
            )
        run.recorded = calls
