# SPDX-License-Identifier: Apache-2.0
"""The step policy: search which part of the trajectory needs finer activations.

The weights stay; only the activation format changes with the timestep. Each mode is measured on
each range of the trajectory, teacher-forced on recorded calls, and the knapsack of ``allocate``
spends the allowed cost where it buys most.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn
from tqdm.auto import tqdm

from dtq.allocate import Option, knapsack
from dtq.errors import InputError
from dtq.formats.activations import activation_format_of
from dtq.models.timestep import timestep_edges
from dtq.nn.timestep_hook import install_clock
from dtq.pipelines.recorded_calls import RecordedCall, relative_error, replay, subsample
from dtq.plan.step_policy import StepPolicy
from dtq.recipe.resolve import Recipe

log = logging.getLogger("dtq")


def search_step_policy(
    model: nn.Module,
    calls: Sequence[RecordedCall],
    recipe: Recipe,
    *,
    static_edges: tuple[float, ...] = (),
    top: float = 0.0,
    progress: bool = True,
) -> StepPolicy:
    """Choose a mode per range of the trajectory.

    A mode costs its activation bits times the sampler steps in the range. The budget is that of
    the cheapest mode everywhere, plus ``recipe.steps.cost`` of what the dearest would add.

    Args:
        model: the quantized transformer.
        calls: one sampling run of the float model, in order.
        recipe: says which modes, how many ranges, and the cost.
        static_edges: of static activation scales, to keep their clock.
        top: largest timestep of the model's family, 0 if unknown.
        progress: show a progress bar.

    Raises:
        InputError: the model is not told the time, or no calls were recorded.
    """
    how = recipe.step_policy
    if not calls or all(call.timestep == 0 for call in calls):
        raise InputError("a step policy needs a model that is called with its timestep")
    edges = timestep_edges(top, calls[0].timestep, how.num_bins)
    by_range: dict[int, list[RecordedCall]] = {}
    for call in calls:
        by_range.setdefault(sum(call.timestep > e for e in edges), []).append(call)
    steps = {r: len({c.timestep for c in cs}) for r, cs in by_range.items()}
    picked = {r: subsample(cs, how.num_inputs) for r, cs in by_range.items()}
    bits = {mode: activation_format_of(mode, recipe.activations).bits for mode in how.precisions}
    tables: dict[str, list[Option]] = {str(r): [] for r in sorted(by_range)}
    total = len(how.precisions) * sum(map(len, picked.values()))
    with tqdm(
        total=total, desc="step policy", unit="call", disable=not progress, dynamic_ncols=True
    ) as bar:
        for mode in how.precisions:
            install_clock(model, static_edges, StepPolicy((), (mode,)))
            for r, sample in picked.items():
                error = sum(relative_error(replay(model, c), c.output) for c in sample) / len(
                    sample
                )
                bar.update(len(sample))
                # one step's error times the steps that make it
                tables[str(r)].append(Option(mode, bits[mode] * steps[r], error * steps[r]))
    least = sum(min(o.cost for o in options) for options in tables.values())
    most = sum(max(o.cost for o in options) for options in tables.values())
    chosen = knapsack(tables, least + int(how.budget * (most - least)))
    modes = _filled([chosen[str(r)].name if r in by_range else "" for r in range(how.num_bins)])
    policy = _merged(edges, modes, [steps.get(r, 0) for r in range(how.num_bins)])
    install_clock(model, static_edges, policy)
    log.info("steps: %s", ", ".join(policy.precisions))
    return policy


def _filled(modes: list[str]) -> list[str]:
    """Ranges that no step fell into do as their less noisy neighbour, or the next one."""
    for i in range(1, len(modes)):
        modes[i] = modes[i] or modes[i - 1]
    for i in reversed(range(len(modes) - 1)):
        modes[i] = modes[i] or modes[i + 1]
    return modes


def _merged(edges: list[float], modes: list[str], steps: list[int]) -> StepPolicy:
    """Neighbours of one mode become one range."""
    starts = [i for i in range(len(modes)) if i == 0 or modes[i] != modes[i - 1]]
    ends = [*starts[1:], len(modes)]
    return StepPolicy(
        tuple(edges[i - 1] for i in starts[1:]),
        tuple(modes[i] for i in starts),
        sum(steps),
        tuple(sum(steps[a:b]) for a, b in zip(starts, ends, strict=True)),
    )
