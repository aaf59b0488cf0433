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
from dtq.stages.layer_result import InputReport, LayerResult, finalize, from_result, to_result
from dtq.stages.run import Run
from dtq.stages.solve_layer import TransformedInput, solve_layer
from dtq.transforms import TransformChoice

log = logging.getLogger("dtq")


def promote(run: Run) -> None:
    """Promote sensitive layers, worst first, while the bits stay within ``promote.budget``.

    A layer is promoted when its output error exceeds ``median_factor`` times the median of the
    model, or ``max_error``, and the promoted layer has a lower error.
    """
    if run.recipe.allocate.budget:  # the budget has decided
        return
    settings = run.recipe.promote
    budget = promotion_budget(run) if settings.to else 0.0
    if budget > settings.budget:
        log.warning(
            "promote.budget of %.2f bits per weight: the layers of this model take %.2f without "
            "any; recipe %s takes %.2f",
            settings.budget, run.plan.bits(run.plan.gemm()), run.recipe.name, budget,
        )  # fmt: skip
    for layer, error in _sensitive(run):
        raised = _raised(run, layer)
        plan = run.plan.with_layers({layer.name: raised})
        if plan.bits(plan.gemm()) > budget:
            continue
        result = _solve_again(run, raised)
        if (result.report.error or 0.0) >= error:
            continue
        result.report.promoted, result.report.error_before = True, error
        run.results[layer.name] = result
        note = f"promoted: error {error:.1e}"
        run.plan = run.plan.with_layers({layer.name: replace(raised, note=note)})
        log.info("promoted %s to %s, output error %.1e", layer.name, raised.weight_format, error)
    run.plan = finalize(run.plan, run.results)


def _sensitive(run: Run) -> Iterator[tuple[LayerPlan, float]]:
    """Layers above the limit and their output errors, the largest first."""
    settings = run.recipe.promote
    errors = {x.name: run.results[x.name].report.error for x in run.plan.gemm()}
    known = {name: error for name, error in errors.items() if error is not None}
    if not settings.to or not known or run.statistics is None:
        return
    limit = min(settings.max_error, settings.median_factor * statistics.median(known.values()))
    layers = [x for x in run.plan.gemm() if x.name in known]
    for layer in sorted(layers, key=lambda x: -known[x.name]):
        fits = layer.weight_format != settings.to == _raised(run, layer).weight_format
        if known[layer.name] > limit and fits:
            yield layer, known[layer.name]


def _raised(run: Run, layer: LayerPlan) -> LayerPlan:
    """The layer in the format of promotion, without a branch, if the model and target allow it."""
    plain = replace(layer.with_spec(rank=0), lowrank=MethodSpec("none"), format_candidates=())
    return in_format(plain, run.recipe.promote.to, run.target)


def _solve_again(run: Run, layer: LayerPlan) -> LayerResult:
    """The layer in its new format, under the transform that it has; a task."""

    def compute() -> Result:
        before = run.results[layer.name]
        choice = TransformChoice(before.transform, before.report.transform, {})
        weight = matrix_of(run.model.get_submodule(layer.name))
        x = TransformedInput.of(run, layer, choice, weight)
        return to_result(
            [solve_layer(layer, weight, x)], InputReport(run.scan.group_of(layer.name))
        )

    tensors, data = run.tasks.get_or_compute(f"promote/{layer.name}", compute)
    ((result,), _) = from_result(tensors, data, run.plan.with_layers({layer.name: layer}))
    return result
