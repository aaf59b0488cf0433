# SPDX-License-Identifier: Apache-2.0
"""Stage: search which part of the trajectory needs finer activations.

The weights stay; only the activation format changes with the timestep. Each precision is measured
on each timestep bin, teacher-forced on recorded calls. The knapsack of ``dtq.allocate`` then spends
the budget where it lowers the error most.
"""

from __future__ import annotations

import logging
from itertools import groupby

from dtq.allocate.knapsack import Option, knapsack
from dtq.errors import InputError
from dtq.formats.activations import activation_format_of
from dtq.linalg.relative_error import relative_error
from dtq.models.timestep import timestep_edges
from dtq.nn.timestep_hook import install_clock
from dtq.pipelines.recorded_calls import RecordedCall, replay, subsample
from dtq.plan.step_policy import StepPolicy
from dtq.stages.run import Run

log = logging.getLogger("dtq")


def step_policy(run: Run) -> None:
    """Choose a precision for each bin of the trajectory.

    A precision costs its activation bits times the sampler steps of the bin. The budget is the
    cost of the cheapest precision everywhere, plus ``step_policy.budget`` times what the most
    expensive one would add.

    Raises:
        InputError: the model is not called with its timestep, or nothing was recorded.
    """
    settings, calls = run.recipe.step_policy, run.recorded
    if not settings.precisions:
        return
    if not calls or all(call.timestep == 0 for call in calls):
        raise InputError("a step policy needs a model that is called with its timestep")
    family = run.loaded.family
    top = family.largest_timestep if family else 0.0
    edges = timestep_edges(top, calls[0].timestep, settings.num_bins)
    by_bin: dict[int, list[RecordedCall]] = {}
    for call in calls:
        by_bin.setdefault(sum(call.timestep > e for e in edges), []).append(call)
    steps = {b: len({call.timestep for call in inside}) for b, inside in by_bin.items()}
    options = _measure(run, by_bin, steps)
    least = sum(min(o.cost for o in each) for each in options.values())
    most = sum(max(o.cost for o in each) for each in options.values())
    chosen = knapsack(options, least + int(settings.budget * (most - least)))
    bins = range(settings.num_bins)
    precisions = _filled([chosen[str(b)].name if b in by_bin else "" for b in bins])
    policy = _merged(edges, precisions, [steps.get(b, 0) for b in bins])
    install_clock(run.model, run.edges, policy)
    run.config.extra.setdefault("runtime", {})["diffusion_step_policy"] = policy.to_json()
    run.report.step_policy = policy.to_json()
    log.info("step policy: %s", ", ".join(policy.precisions))


def _measure(
    run: Run, by_bin: dict[int, list[RecordedCall]], steps: dict[int, int]
) -> dict[str, list[Option]]:
    """Cost and error of every precision in every bin: one step's error times the steps of it."""
    settings = run.recipe.step_policy
    samples = {b: subsample(calls, settings.num_inputs) for b, calls in by_bin.items()}
    options: dict[str, list[Option]] = {str(b): [] for b in sorted(by_bin)}
    total = len(settings.precisions) * sum(map(len, samples.values()))
    with run.progress_bar("step policy", total=total, unit="call") as bar:
        for name in settings.precisions:
            bits = activation_format_of(name, run.recipe.activations).bits
            install_clock(run.model, run.edges, StepPolicy((), (name,)))
            for b, calls in samples.items():
                errors = [relative_error(replay(run.model, c), c.output) for c in calls]
                bar.update(len(calls))
                error = sum(errors) / len(errors)
                options[str(b)].append(Option(name, bits * steps[b], error * steps[b]))
    return options


def _filled(precisions: list[str]) -> list[str]:
    """Bins without a step take the precision of the less noisy neighbor, or of the next one."""
    filled = [""]
    for precision in precisions:
        filled.append(precision or filled[-1])
    return [precision or next(filter(None, filled)) for precision in filled[1:]]


def _merged(edges: list[float], precisions: list[str], steps: list[int]) -> StepPolicy:
    """Neighboring bins with the same precision become one."""
    ranges = [[*bins] for _, bins in groupby(range(len(steps)), key=precisions.__getitem__)]
    return StepPolicy(
        tuple(edges[first - 1] for first, *_ in ranges[1:]),
        tuple(precisions[first] for first, *_ in ranges),
        sum(steps),
        tuple(sum(steps[b] for b in bins) for bins in ranges),
    )
