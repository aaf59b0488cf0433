# SPDX-License-Identifier: Apache-2.0
"""Stage: fine-tune scales, tables and low-rank branches, block by block."""

from __future__ import annotations

from dtq.finetune import FINETUNE
from dtq.pipelines.recorded_calls import subsample
from dtq.stages.run import Run

TEACHER_CALLS = 40
"""Recorded calls of the float model that fine-tuning learns from."""


def finetune(run: Run) -> None:
    """Run the fine-tuning method of the recipe; integer weights stay frozen."""
    method = run.recipe.finetune
    if method.name == "none":
        return
    tune, knobs = FINETUNE[method.name], dict(method.knobs)
    calls, tasks = subsample(run.recorded, TEACHER_CALLS), run.tasks.namespace("finetune")
    report = tune(run.model, run.floats, calls, progress=run.progress, tasks=tasks, **knobs)
    run.report.finetune = report.to_json()
