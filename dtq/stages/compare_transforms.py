# SPDX-License-Identifier: Apache-2.0
"""Stage: quantize the whole model with other transforms too, and keep the best."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import nn

from dtq.allocate import measure
from dtq.calibrate.collection import Statistics
from dtq.io.schema import MethodSpec
from dtq.models import Scan
from dtq.nn.timestep_hook import install_clock
from dtq.pipelines.recorded_calls import RecordedCall, subsample
from dtq.plan.layers import Plan
from dtq.recipe.resolve import Recipe
from dtq.runs.tasks import TaskStore
from dtq.stages.candidates import NUM_INPUTS, CandidateLayers
from dtq.stages.layer_result import LayerResult
from dtq.stages.solve import solve_all

log = logging.getLogger("dtq")


def compare_transforms(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    recorded: list[RecordedCall],
    solved: dict[str, LayerResult],
    *,
    progress: bool = True,
    tasks: TaskStore | None = None,
) -> dict[str, float]:
    """Solve the whole model with other transforms too, and keep what errs least.

    A transform is searched input by input on sampled rows; how errors add up over the model is
    only seen on its output. ``solved`` is completed with the winner.

    Returns:
        Teacher-forced error of each candidate, the recipe's own first.
    """
    calls, gemm = subsample(recorded, NUM_INPUTS), {x.name for x in plan.gemm()}
    found = {recipe.transform.name: {name: solved[name] for name in gemm}}
    for other in recipe.transform_candidates:
        changed = {x.name: replace(x, transform=MethodSpec(other)) for x in plan.gemm()}
        found[other], _ = solve_all(
            model, scan, plan.with_layers(changed), recipe, statistics, only=gemm, what=other,
            progress=progress, tasks=tasks,
        )  # fmt: skip
    edges = statistics.edges if statistics is not None and plan.bins > 1 else ()
    clock = install_clock(model, edges) if edges else None
    candidates = {"model": CandidateLayers(model, found, plan.bins, clock)}
    errors = measure(
        model, calls, candidates, progress=progress, what="compare transforms", tasks=tasks
    )["model"]
    best = min(errors, key=lambda name: errors[name]["mse"])
    solved |= found[best]
    log.info("transform: %s", ", ".join(f"{n} {e['mse']:.2e}" for n, e in errors.items()))
    return {name: error["mse"] for name, error in errors.items()}
