# SPDX-License-Identifier: Apache-2.0
"""Stage: quantize the whole model with other transforms too, and keep the best."""

from __future__ import annotations

import logging
from dataclasses import replace

from dtq.io.schema import MethodSpec
from dtq.stages.candidates import NUM_INPUTS, measure_candidates
from dtq.stages.run import Run
from dtq.stages.solve import solve_layers

log = logging.getLogger("dtq")


def compare_transforms(run: Run) -> None:
    """Keep the transform of ``transform_candidates`` whose whole model has the lowest error.

    A transform is searched one input at a time, on sampled rows. How the errors of all layers add
    up shows only on the model's output, on recorded inputs.
    """
    recipe = run.recipe
    if not recipe.transform_candidates:
        return
    if not run.recorded:
        no_calls = "its pipeline runs layers one by one, and there are no whole calls"
        log.warning(
            "%s to compare transforms on: %s stays, without trying %s",
            no_calls if run.has_data else "no pipeline and no inputs",
            recipe.transform.name, ", ".join(recipe.transform_candidates),
        )  # fmt: skip
        return
    gemm = {x.name for x in run.plan.gemm()}
    results = {recipe.transform.name: {name: run.results[name] for name in gemm}}
    for other in recipe.transform_candidates:
        changed = {x.name: replace(x, transform=MethodSpec(other)) for x in run.plan.gemm()}
        results[other], _ = solve_layers(run, run.plan.with_layers(changed), gemm, other)
    measured = measure_candidates(run, {"model": results}, NUM_INPUTS, "compare transforms")
    errors = measured["model"]
    run.results |= results[min(errors, key=lambda name: errors[name]["mse"])]
    total = run.report.transform_errors = {name: error["mse"] for name, error in errors.items()}
    log.info("transform: %s", ", ".join(f"{name} {error:.2e}" for name, error in total.items()))
