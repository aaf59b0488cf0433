# SPDX-License-Identifier: Apache-2.0
"""Stage: give the layers with the largest output error a finer format."""

from __future__ import annotations

import logging
import statistics as numbers
from dataclasses import replace

from torch import nn

from dtq.calibrate.collection import Statistics
from dtq.io.schema import MethodSpec
from dtq.models import Scan
from dtq.models.linears import matrix_of
from dtq.plan.layers import LayerPlan, Plan
from dtq.recipe.resolve import Recipe
from dtq.runs.tasks import Result, TaskStore
from dtq.stages.layer_result import InputReport, LayerResult, finalize, from_result, to_result
from dtq.stages.solve_layer import solve_layer
from dtq.transforms import TransformChoice

log = logging.getLogger("dtq")


def promote(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    solved: dict[str, LayerResult],
    tasks: TaskStore | None = None,
) -> Plan:
    """Promote the layers that came out badly, worst first, while the budget lasts."""
    tasks = tasks or TaskStore()
    how = recipe.promote
    gemm = [x for x in plan.gemm() if solved[x.name].report.error is not None]
    if not how.to or not gemm or statistics is None:
        return finalize(plan, solved)
    sites = statistics.inputs
    errors = {x.name: solved[x.name].report.error or 0.0 for x in gemm}
    limit = min(how.max_error, how.median_factor * numbers.median(errors.values()))
    site_of = {x.name: site.name for site in scan.input_groups for x in site.linears}
    for layer in sorted(gemm, key=lambda x: -errors[x.name]):
        if errors[layer.name] <= limit or layer.weight_format == how.to:
            continue
        raised = replace(
            layer, weight_format=how.to, rank=0, lowrank=MethodSpec("none"), format_candidates=()
        )
        if (
            plan.with_layers({layer.name: raised}).bits(
                plan.with_layers({layer.name: raised}).gemm()
            )
            > how.budget
        ):
            continue

        def again_in(
            raised: LayerPlan = raised, before: LayerResult = solved[layer.name]
        ) -> Result:
            choice = TransformChoice(before.transform, before.report.transform, {})
            stats = sites[site_of[raised.name]]
            weight = matrix_of(model.get_submodule(raised.name))
            result = solve_layer(raised, weight, choice, stats, recipe)
            return to_result([result], InputReport(site_of[raised.name]))

        promoted = plan.with_layers({layer.name: raised})
        ((again,), _) = from_result(
            *tasks.get_or_compute(f"guard/{layer.name}", again_in), promoted
        )
        if (again.report.error or 0.0) >= errors[layer.name]:
            continue
        again.report.promoted, again.report.error_before = True, errors[layer.name]
        solved[layer.name] = again
        plan = plan.with_layers(
            {layer.name: replace(raised, note=f"promoted: error {errors[layer.name]:.1e}")}
        )
        log.info("guard: %s to %s, output error %.1e", layer.name, how.to, errors[layer.name])
    return finalize(plan, solved)
