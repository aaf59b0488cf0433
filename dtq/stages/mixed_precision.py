# SPDX-License-Identifier: Apache-2.0
"""Who gets how many bits: the guard that promotes what came out badly, and mixed precision."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from torch import nn

from dtq.allocate import Allocation, allocate, groups_of, measure, parse_budget
from dtq.calibrate.collection import Statistics
from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.models import Scan
from dtq.nn.timestep_hook import install_clock
from dtq.pipelines.recorded_calls import RecordedCall, subsample
from dtq.plan.layers import LayerPlan, Plan
from dtq.recipe.resolve import Recipe
from dtq.runs.tasks import TaskStore
from dtq.stages.candidates import CandidateLayers
from dtq.stages.layer_result import LayerResult, finalize
from dtq.stages.solve import solve_all

log = logging.getLogger("dtq")


def check_budget(plan: Plan, recipe: Recipe) -> None:
    """Refuse a budget below the cheapest options before any work is done.

    Raises:
        InputError: says the least there is.
    """
    weights = sum(math.prod(x.shape) for x in plan.gemm())
    budget = parse_budget(str(recipe.allocate.budget), weights)
    least = sum(
        min(_in_format(x, option).nbytes(plan.bins) for option in recipe.allocate.formats)
        for x in plan.gemm()
    )
    if budget < least:
        raise InputError(
            f"a budget of {recipe.allocate.budget} is too small: the options "
            f"{', '.join(recipe.allocate.formats)} need at least {least} bytes "
            f"({8 * least / weights:.3f} bits per weight). Raise it, or allow narrower formats"
        )


def mixed_precision(
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
) -> tuple[Plan, Allocation]:
    """Give every site the format that the recipe's budget allows.

    Every option is solved for every site, measured alone in the float model on recorded calls, and
    the best combination within the budget is taken (``dtq.allocate``).

    Args:
        model: the float transformer.
        scan: its linears.
        plan: the recipe's, in its plain weight format.
        recipe: says which options and the budget.
        statistics: of calibration.
        recorded: calls of the float model.
        solved: results in the plain format; completed with the chosen ones.
        progress: show progress bars.
        work: keeps every layer solved and every option measured.

    Raises:
        InputError: the budget is below what the cheapest options need.
    """
    how, gemm = recipe.allocate, {x.name for x in plan.gemm()}
    sites = {
        s.name: names
        for s in scan.input_groups
        if (names := [x.name for x in s.linears if x.name in gemm])
    }
    weights = {
        site: sum(math.prod(plan[name].shape) for name in names) for site, names in sites.items()
    }
    budget = parse_budget(str(how.budget), sum(weights.values()))
    results: dict[str, dict[str, dict[str, LayerResult]]] = {site: {} for site in sites}
    for option in how.formats:
        found = solved
        if option != recipe.weights:
            other = plan.with_layers({x.name: _in_format(x, option) for x in plan.gemm()})
            for x in other.gemm():
                if x.weight_format != option:
                    log.warning("%s: stays in %s: %s", x.name, x.weight_format, x.note)
            found, _ = solve_all(
                model, scan, other, recipe, statistics, only=gemm, what=option, progress=progress,
                tasks=tasks,
            )  # fmt: skip
        for site, names in sites.items():
            results[site][option] = {name: found[name] for name in names}
    edges = statistics.edges if statistics is not None and plan.bins > 1 else ()
    clock = install_clock(model, edges) if edges else None
    candidates = {
        site: CandidateLayers(model, options, plan.bins, clock) for site, options in results.items()
    }
    costs = {
        site: {o: sum(r.plan.nbytes(plan.bins) for r in f.values()) for o, f in options.items()}
        for site, options in results.items()
    }
    calls = subsample(recorded, how.num_inputs)
    chosen = allocate(
        measure(model, calls, candidates, progress=progress, what="allocate", tasks=tasks),
        costs,
        budget,
        groups=groups_of(s for s in scan.input_groups if s.name in sites),
        weights=weights,
        per_group_metric=how.per_group_metric,
    )
    for site, option in chosen.choice.items():
        solved |= results[site][option]
    return finalize(plan, solved), chosen


def _in_format(layer: LayerPlan, option: str) -> LayerPlan:
    """The layer in another format, if that fits its shape; otherwise as it is, with a note."""
    try:
        FORMATS[option].tensor_specs(layer.shape)
    except InputError as error:
        return replace(layer, note=layer.note or str(error).split(". Use")[0])
    return replace(layer, weight_format=option, format_candidates=())
