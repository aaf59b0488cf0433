# SPDX-License-Identifier: Apache-2.0
"""Who gets how many bits: the guard that promotes what came out badly, and mixed precision."""

from __future__ import annotations

import logging
import math
import statistics as numbers
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from dtq.allocate import Allocation, allocate, groups_of, measure, parse_budget
from dtq.calibrate.calls import Recorded, spread
from dtq.calibrate.engine import Statistics
from dtq.errors import InputError
from dtq.families import Scan
from dtq.formats import FORMATS
from dtq.nn.linear import StepClock, matrix_of
from dtq.nn.swap import install_clock
from dtq.plan import Call, LayerPlan, Plan
from dtq.recipe import Recipe
from dtq.solve import built, solve, solve_all
from dtq.solved import SiteReport, Solved, from_result, to_result
from dtq.transforms import Choice
from dtq.work import Result, Work

log = logging.getLogger("dtq")

RECORDED = 4  # pictures whose sampling by the float model is recorded, to compare with
JUDGES = 24  # recorded calls that whole-model alternatives are judged on


def check_budget(plan: Plan, recipe: Recipe) -> None:
    """Refuse a budget below the cheapest options before any work is done.

    Raises:
        InputError: says the least there is.
    """
    weights = sum(math.prod(x.shape) for x in plan.gemm())
    budget = parse_budget(str(recipe.allocate.budget), weights)
    least = sum(
        min(_in_format(x, option).nbytes(plan.bins) for option in recipe.allocate.options)
        for x in plan.gemm()
    )
    if budget < least:
        raise InputError(
            f"a budget of {recipe.allocate.budget} is too small: the options "
            f"{', '.join(recipe.allocate.options)} need at least {least} bytes "
            f"({8 * least / weights:.3f} bits per weight). Raise it, or allow narrower formats"
        )


def mixed(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    recorded: list[Recorded],
    solved: dict[str, Solved],
    *,
    progress: bool = True,
    work: Work | None = None,
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
        for s in scan.sites
        if (names := [x.name for x in s.linears if x.name in gemm])
    }
    weights = {
        site: sum(math.prod(plan[name].shape) for name in names) for site, names in sites.items()
    }
    budget = parse_budget(str(how.budget), sum(weights.values()))
    results: dict[str, dict[str, dict[str, Solved]]] = {site: {} for site in sites}
    for option in how.options:
        found = solved
        if option != recipe.weights:
            other = plan.with_layers({x.name: _in_format(x, option) for x in plan.gemm()})
            for x in other.gemm():
                if x.weights != option:
                    log.warning("%s: stays in %s: %s", x.name, x.weights, x.note)
            found, _ = solve_all(
                model, scan, other, recipe, statistics, only=gemm, what=option, progress=progress,
                work=work,
            )  # fmt: skip
        for site, names in sites.items():
            results[site][option] = {name: found[name] for name in names}
    edges = statistics.edges if statistics is not None and plan.bins > 1 else ()
    clock = install_clock(model, edges) if edges else None
    candidates = {
        site: Built(model, options, plan.bins, clock) for site, options in results.items()
    }
    costs = {
        site: {o: sum(r.plan.nbytes(plan.bins) for r in f.values()) for o, f in options.items()}
        for site, options in results.items()
    }
    calls = spread(recorded, how.calls)
    chosen = allocate(
        measure(model, calls, candidates, progress=progress, what="allocate", work=work),
        costs,
        budget,
        groups=groups_of(s for s in scan.sites if s.name in sites),
        weights=weights,
        decoupled=how.decoupled,
    )
    for site, option in chosen.choice.items():
        solved |= results[site][option]
    return final(plan, solved), chosen


def compare(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    recorded: list[Recorded],
    solved: dict[str, Solved],
    *,
    progress: bool = True,
    work: Work | None = None,
) -> dict[str, float]:
    """Solve the whole model with other transforms too, and keep what errs least.

    A transform is searched input by input on sampled rows; how errors add up over the model is
    only seen on its output. ``solved`` is completed with the winner.

    Returns:
        Teacher-forced error of each candidate, the recipe's own first.
    """
    calls, gemm = spread(recorded, JUDGES), {x.name for x in plan.gemm()}
    found = {recipe.transform.name: {name: solved[name] for name in gemm}}
    for other in recipe.compare:
        changed = {x.name: replace(x, transform=Call(other)) for x in plan.gemm()}
        found[other], _ = solve_all(
            model, scan, plan.with_layers(changed), recipe, statistics, only=gemm, what=other,
            progress=progress, work=work,
        )  # fmt: skip
    edges = statistics.edges if statistics is not None and plan.bins > 1 else ()
    clock = install_clock(model, edges) if edges else None
    candidates = {"model": Built(model, found, plan.bins, clock)}
    errors = measure(model, calls, candidates, progress=progress, what="compare", work=work)[
        "model"
    ]
    best = min(errors, key=lambda name: errors[name]["mse"])
    solved |= found[best]
    log.info("transform: %s", ", ".join(f"{n} {e['mse']:.2e}" for n, e in errors.items()))
    return {name: error["mse"] for name, error in errors.items()}


class Built(Mapping[str, dict[str, nn.Module]]):
    """Option to the quantized linears by name, built when looked up: never two options at once.

    Args:
        model: the float model that they will stand in; its clock tells them the time.
        options: option to solved layers.
        bins: timestep bins of static scales.
        clock: of the model, None without one.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Mapping[str, Mapping[str, Solved]],
        bins: int,
        clock: StepClock | None,
    ) -> None:
        self.model, self.options, self.bins, self.clock = model, options, bins, clock

    def __getitem__(self, option: str) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for name, result in self.options[option].items():
            old = self.model.get_submodule(name)
            new = built(result, old, self.bins, next(old.parameters()).dtype)
            new.hear(self.clock)
            modules[name] = new
        return modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.options)

    def __len__(self) -> int:
        return len(self.options)


def _in_format(layer: LayerPlan, option: str) -> LayerPlan:
    """The layer in another format, if that fits its shape; otherwise as it is, with a note."""
    try:
        FORMATS[option].layout(layer.shape)
    except InputError as error:
        return replace(layer, note=layer.note or str(error).split(". Use")[0])
    return replace(layer, weights=option, choose=())


def guard(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    solved: dict[str, Solved],
    work: Work | None = None,
) -> Plan:
    """Promote the layers that came out badly, worst first, while the budget lasts."""
    work = work or Work()
    how = recipe.guard
    gemm = [x for x in plan.gemm() if solved[x.name].report.error is not None]
    if not how.to or not gemm or statistics is None:
        return final(plan, solved)
    sites = statistics.sites
    errors = {x.name: solved[x.name].report.error or 0.0 for x in gemm}
    limit = min(how.above, how.factor * numbers.median(errors.values()))
    site_of = {x.name: site.name for site in scan.sites for x in site.linears}
    for layer in sorted(gemm, key=lambda x: -errors[x.name]):
        if errors[layer.name] <= limit or layer.weights == how.to:
            continue
        raised = replace(layer, weights=how.to, rank=0, lowrank=Call("none"), choose=())
        if (
            plan.with_layers({layer.name: raised}).bits(
                plan.with_layers({layer.name: raised}).gemm()
            )
            > how.budget
        ):
            continue

        def again_in(raised: LayerPlan = raised, before: Solved = solved[layer.name]) -> Result:
            choice = Choice(before.transform, before.report.transform, {})
            stats = sites[site_of[raised.name]]
            weight = matrix_of(model.get_submodule(raised.name))
            result = solve(raised, weight, choice, stats, recipe)
            return to_result([result], SiteReport(site_of[raised.name]))

        promoted = plan.with_layers({layer.name: raised})
        ((again,), _) = from_result(*work.once(f"guard/{layer.name}", again_in), promoted)
        if (again.report.error or 0.0) >= errors[layer.name]:
            continue
        again.report.promoted, again.report.error_before = True, errors[layer.name]
        solved[layer.name] = again
        plan = plan.with_layers(
            {layer.name: replace(raised, note=f"promoted: error {errors[layer.name]:.1e}")}
        )
        log.info("guard: %s to %s, output error %.1e", layer.name, how.to, errors[layer.name])
    return final(plan, solved)


def final(plan: Plan, solved: dict[str, Solved]) -> Plan:
    """The plan with the formats, transforms and ranks that were chosen."""
    return plan.with_layers(
        {
            x.name: replace(solved[x.name].plan, note=x.note or solved[x.name].plan.note)
            for x in plan.quantized()
        }
    )
