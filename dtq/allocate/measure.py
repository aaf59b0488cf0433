# SPDX-License-Identifier: Apache-2.0
"""Measure what each option does to the output, and make one number of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dtq.allocate.metrics import METRICS, content
from dtq.nn.swap import temporarily_replaced
from dtq.pipelines.recorded_calls import RecordedCall, by_timestep, replay
from dtq.runs.tasks import TaskStore

Measured = dict[str, dict[str, dict[str, float]]]
"""Item, option, metric to damage."""


@torch.no_grad()
def measure(
    model: nn.Module,
    calls: Sequence[RecordedCall],
    candidates: Mapping[str, Mapping[str, Mapping[str, nn.Module]]],
    *,
    progress: bool = True,
    what: str = "measure",
    tasks: TaskStore | None = None,
) -> Measured:
    """Damage of each option of each item alone, everything else float, on the same inputs.

    Args:
        model: the float model, in evaluation mode; it is as before afterwards, also on errors.
        calls: what it was given and what it gave. Two in a row with the same latents are taken as
            the two halves of guidance.
        candidates: item, option, layer name to the module that stands in for the float linear, on
            any device. Each option is looked up once, so the mappings may build it then.
        progress: show a progress bar.
        what: name of the stage; an option of an item is a unit of ``work``.
        work: where units are kept and shared.

    Returns:
        Every metric, averaged over the calls; infinite where an output was not finite.
    """
    assert calls, "nothing was recorded"
    tasks = tasks or TaskStore()
    pairs = by_timestep(calls)
    units = {
        f"{what}/{item}/{option}": (item, option)
        for item, options in candidates.items()
        for option in options
    }
    todo = tasks.assigned(dict.fromkeys(units, 1.0))
    with tqdm(
        total=len(calls) * len(todo),
        desc=what, unit="call", disable=not progress, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for unit in todo:
            item, option = units[unit]
            with temporarily_replaced(model, candidates[item][option]):
                found = []
                for moment in pairs:
                    got = [replay(model, call) for call in moment]
                    found.append(_compare(moment, got))
                    bar.update(len(moment))
            means = {name: sum(each[name] for each in found) / len(found) for name in METRICS}
            tasks.save(unit, {}, means)
    tasks.barrier()
    measured: Measured = {item: {} for item in candidates}
    for unit, (item, option) in units.items():
        measured[item][option] = tasks.load(unit)[1]
    return measured


def _compare(moment: Sequence[RecordedCall], got: Sequence[Tensor]) -> dict[str, float]:
    latents = moment[0].latents
    half = len(latents) // 2
    guided = len(moment) == 2 or torch.equal(latents[:half], latents[half:])
    pair = torch.cat([call.output for call in moment]), torch.cat(list(got))
    chosen = METRICS if guided else METRICS | {"text": content}
    return {name: metric(*pair) for name, metric in chosen.items()}


def sensitivities(
    measured: Mapping[str, Mapping[str, Mapping[str, float]]],
    groups: Mapping[str, str],
    *,
    per_group_metric: bool = True,
) -> dict[str, dict[str, float]]:
    """One number per item and option, in units of the output's relative squared error.

    Decoupled, for item i in group g and option o, m being the metric of g::

        d(i, o) = M_g(o) * m(i, o) / sum_{j in g} m(j, o),    M_g(o) = sum_{j in g} mse(j, o)

    The metric ranks the items inside a group and cannot move anything between groups; what a
    group loses altogether is its plain error, as if errors of layers added up. ViDiT-Q quantizes
    each group at once for that (2406.02540, sec. 3.4); the sum over layers is ours, it needs no
    forwards of its own. Where a metric sees nothing in a whole group, ``mse`` stands in for it.

    Args:
        measured: from :func:`measure`; options mean the same for every item.
        groups: item to a key of ``METRICS``.
        per_group_metric: otherwise ``d = mse``.

    Returns:
        Item, option to damage, infinite where an output was not finite.
    """
    plain = {i: {o: m["mse"] for o, m in options.items()} for i, options in measured.items()}
    if not per_group_metric:
        return plain
    ranks = {i: {o: m[groups[i]] for o, m in options.items()} for i, options in measured.items()}
    whole: dict[tuple[str, str], float] = {}
    shares: dict[tuple[str, str], float] = {}
    for item, options in ranks.items():
        for option, rank in options.items():
            if math.isfinite(rank + plain[item][option]):
                key = groups[item], option
                whole[key] = whole.get(key, 0.0) + plain[item][option]
                shares[key] = shares.get(key, 0.0) + rank

    def damage(item: str, option: str) -> float:
        key, rank, error = (groups[item], option), ranks[item][option], plain[item][option]
        if not math.isfinite(rank + error):
            return math.inf
        return whole[key] * (rank / shares[key]) if shares[key] else error

    return {i: {o: damage(i, o) for o in options} for i, options in measured.items()}
