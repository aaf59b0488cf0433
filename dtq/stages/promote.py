# SPDX-License-Identifier: Apache-2.0
"""Stage: give the layers with the largest output error a finer format."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator
from dataclasses import replace

from dtq.engines.constrain import in_format
from dtq.io.schema import MethodSpec
from dtq.models.linears import matrix_of
from dtq.plan.layers import LayerPlan
from dtq.runs.tasks import Result
from dtq.stages.budget import promotion_budget
from dtq.stages.joined_layers import names_in_one_matrix
from dtq.stages.layer_result import InputReport, LayerResult, finalize, from_result, to_result
from dtq.stages.run import Run
from dtq.stages.solve_input import solve_input_group
from dtq.stages.solve_layer import TransformedInput
from dtq.transforms import TransformChoice

log = logging.getLogger("dtq")


def promote(run: Run) -> None:
    """Promote sensitive layers, worst first, while the bits stay within ``promote.budget``.

    A layer is promoted when its output error exceeds ``median_factor`` times the median of the
    model, or ``max_error``, and the promoted layer has a lower error. Layers that the run's target
    has in one matrix are promoted together, if that lowers the sum of their errors.
    """
    if run.formats:  # the budget has decided
        return
    settings = run.recipe.promote
    budget = promotion_budget(run) if settings.to else 0.0
    if budget > settings.budget:
        log.warning(
            "promote.budget of %.2f bits per weight: the layers of this model take %.2f without "
            "any; recipe %s takes %.2f",
            settings.budget, run.plan.bits(run.plan.gemm()), run.recipe.name, budget,
        )  # fmt: skip
    for name in _sensitive(run):
        raised = [_raised(run, run.plan[x]) for x in names_in_one_matrix(name, run.joined)]
        if any(x.weight_format != settings.to for x in raised):
            continue
        plan = run.plan.with_layers({x.name: x for x in raised})
        if plan.bits(plan.gemm()) > budget:
            continue
        solved, before = _solve_again(run, raised), [run.results[x.name].report for x in raised]
        if sum(x.report.error or 0.0 for x in solved) >= sum(x.error or 0.0 for x in before):
            continue
        for layer, result, old in zip(raised, solved, before, strict=True):
            result.report.promoted, result.report.error_before = True, old.error
            run.results[layer.name] = result
            note = f"promoted: error {old.error or 0.0:.1e}"
            run.plan = run.plan.with_layers({layer.name: replace(layer, note=note)})
            log.info("promoted %s to %s, output error %.1e", layer.name, settings.to, old.error)
    run.plan = finalize(run.plan, run.results)


def _sensitive(run: Run) -> Iterator[str]:
    """Layers whose output error is above the limit, the largest first."""
    settings = run.recipe.promote
    errors = {x.name: run.results[x.name].report.error for x in run.plan.gemm()}
    known = {name: error for name, error in errors.items() if error is not None}
    if not settings.to or not known or run.statistics is None:
        return
    limit = min(settings.max_error, settings.median_factor * statistics.median(known.values()))
    for name in sorted(known, key=lambda name: -known[name]):
        # the present plan: it may have been promoted with another layer
        if known[name] > limit and run.plan[name].weight_format != settings.to:
            yield name


def _raised(run: Run, layer: LayerPlan) -> LayerPlan:
    """The layer in the format of promotion, without a branch, if the model and target allow it."""
    plain = replace(layer.with_spec(rank=0), lowrank=MethodSpec("none"), format_candidates=())
    return in_format(plain, run.recipe.promote.to, run.target)


def _solve_again(run: Run, layers: list[LayerPlan]) -> list[LayerResult]:
    """Layers that share an input in their new format, under the transform that it has; a task."""
    first = layers[0]

    def compute() -> Result:
        before = run.results[first.name]
        choice = TransformChoice(before.transform, before.report.transform, {})
        weights = [matrix_of(run.model.get_submodule(layer.name)) for layer in layers]
        x = TransformedInput.of(run, first, choice, weights[0])
        results = solve_input_group(layers, weights, x, run.joined)
        return to_result(results, InputReport(run.scan.group_of(first.name)))

    tensors, data = run.tasks.get_or_compute(f"promote/{first.name}", compute)
    plan = run.plan.with_layers({layer.name: layer for layer in layers})
    return from_result(tensors, data, plan)[0]
