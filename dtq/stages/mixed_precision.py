# SPDX-License-Identifier: Apache-2.0
"""Stage: give every input group the weight format that the recipe's budget allows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from dtq.allocate.allocation import choose, parse_budget
from dtq.allocate.measure import sensitivities
from dtq.allocate.metrics import groups_of
from dtq.engines.constrain import in_format
from dtq.plan import Plan
from dtq.stages.candidates import measure_candidates
from dtq.stages.layer_result import LayerResult, finalize
from dtq.stages.run import Run
from dtq.stages.solve import solve_layers

log = logging.getLogger("dtq")


def mixed_precision(run: Run) -> None:
    """Choose weight formats within ``allocate.budget`` (``dtq.allocate``).

    Every format is solved for every input group and measured alone in the float model on recorded
    inputs. The knapsack then takes the best combination within the budget.
    """
    settings, plan = run.recipe.allocate, run.plan
    if not settings.budget:
        return
    members = members_of(run)
    results = solve_every_format(run, members)
    weights = {g: sum(math.prod(plan[x].shape) for x in names) for g, names in members.items()}
    groups = groups_of(g for g in run.scan.input_groups if g.name in members)
    measured = measure_candidates(run, results, settings.num_inputs, "allocate")
    chosen = choose(
        sensitivities(measured, groups, per_group_metric=settings.per_group_metric),
        costs_of(results, plan.bins),
        parse_budget(str(settings.budget), sum(weights.values())),
        groups=groups,
        weights=weights,
    )
    for group, option in chosen.choice.items():
        run.results |= results[group][option]
    run.plan = finalize(plan, run.results)
    run.report.allocation = chosen.to_json()


def members_of(run: Run) -> dict[str, list[str]]:
    """Attention and feed-forward layers by input group."""
    gemm = {x.name for x in run.plan.gemm()}
    return {
        group.name: names
        for group in run.scan.input_groups
        if (names := [x.name for x in group.linears if x.name in gemm])
    }


def in_option(run: Run, option: str) -> Plan:
    """The plan with every attention and feed-forward layer in one format, where that fits."""
    if option == run.recipe.weights:
        return run.plan
    moved = {x.name: in_format(x, option, run.target) for x in run.plan.gemm()}
    return run.plan.with_layers(moved)


def costs_of(
    results: Mapping[str, Mapping[str, Mapping[str, LayerResult]]], bins: int
) -> dict[str, dict[str, int]]:
    """Bytes by input group and format.

    Args:
        results: by input group, format and layer name.
        bins: timestep bins of static activation scales.
    """
    return {
        group: {
            option: sum(result.plan.nbytes(bins) for result in layers.values())
            for option, layers in options.items()
        }
        for group, options in results.items()
    }


def solve_every_format(
    run: Run, members: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, dict[str, LayerResult]]]:
    """Results by input group, format and layer name."""
    gemm = {name for names in members.values() for name in names}
    results: dict[str, dict[str, dict[str, LayerResult]]] = {group: {} for group in members}
    for option in run.recipe.allocate.formats:
        solved = run.results
        if option != run.recipe.weights:
            other = in_option(run, option)
            for x in other.gemm():
                if x.weight_format != option:
                    log.warning("%s: stays in %s: %s", x.name, x.weight_format, x.note)
            solved, _ = solve_layers(run, other, gemm, option)
        for group, names in members.items():
            results[group][option] = {name: solved[name] for name in names}
    return results
