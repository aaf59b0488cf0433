# SPDX-License-Identifier: Apache-2.0
"""Measure the output error of each option, and reduce its metrics to one sensitivity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dtq.allocate.metrics import METRICS, content
from dtq.nn.swap import temporarily_replaced
from dtq.pipelines.recorded_calls import RecordedCall, by_timestep, replay
from dtq.runs.tasks import TaskStore

Measured = dict[str, dict[str, dict[str, float]]]
"""Item, option, metric to error."""


@torch.no_grad()
def measure(
    model: nn.Module,
    calls: Sequence[RecordedCall],
    candidates: Mapping[str, Mapping[str, Mapping[str, nn.Module]]],
    *,
    outputs: Callable[[], Iterable[Tensor]] | None = None,
    progress: bool = True,
    what: str = "measure",
    tasks: TaskStore | None = None,
) -> Measured:
    """Output error of each option of each item alone, everything else float, on the same inputs.

    Args:
        model: the float model, in evaluation mode. It is as before afterwards, also after an error.
        calls: its recorded inputs and outputs. Two in a row with the same latents are taken as the
            two halves of guidance.
        candidates: item, option, layer name to the module that replaces the float linear, on any
            device. Each option is looked up once, so a mapping may build its modules then.
        outputs: gives the output for each of ``calls`` while ``model`` is changed. Default: the
            model itself replays them. For a text encoder another model does.
        progress: show a progress bar.
        what: name of the stage; an option of an item is a task with that prefix.
        tasks: store that keeps the results, and distributes the tasks among processes. None: in
            memory, in this process.

    Returns:
        Every metric, averaged over the calls; infinite where an output is not finite.
    """
    assert calls, "nothing was recorded"
    tasks = tasks or TaskStore()
    pairs = by_timestep(calls)
    options = {f"{what}/{item}/{o}": (item, o) for item, table in candidates.items() for o in table}
    mine = tasks.assigned(dict.fromkeys(options, 1.0))
    with tqdm(
        total=len(calls) * len(mine),
        desc=what, unit="call", disable=not progress, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for task in mine:
            item, option = options[task]
            errors = []
            with temporarily_replaced(model, candidates[item][option]):
                given = iter(outputs() if outputs else (replay(model, call) for call in calls))
                for pair in pairs:
                    errors.append(_compare(pair, list(itertools.islice(given, len(pair)))))
                    bar.update(len(pair))
            means = {name: sum(e[name] for e in errors) / len(errors) for name in METRICS}
            tasks.save(task, {}, means)
    tasks.barrier()
    measured: Measured = {item: {} for item in candidates}
    for task, (item, option) in options.items():
        measured[item][option] = tasks.load(task)[1]
    return measured


def _compare(pair: Sequence[RecordedCall], outputs: Sequence[Tensor]) -> dict[str, float]:
    latents = pair[0].latents
    half = len(latents) // 2
    guided = len(pair) == 2 or torch.equal(latents[:half], latents[half:])
    metrics = METRICS if guided else METRICS | {"text": content}
    reference, output = torch.cat([call.output for call in pair]), torch.cat(list(outputs))
    return {name: metric(reference, output) for name, metric in metrics.items()}


def sensitivities(
    measured: Mapping[str, Mapping[str, Mapping[str, float]]],
    groups: Mapping[str, str],
    *,
    per_group_metric: bool = True,
) -> dict[str, dict[str, float]]:
    """One number per item and option, in units of the output's relative squared error.

    With a metric per group, for item i in group g and option o, m being the metric of g::

        d(i, o) = M_g(o) * m(i, o) / sum_{j in g} m(j, o),    M_g(o) = sum_{j in g} mse(j, o)

    The metric ranks the items inside a group and moves nothing between groups. The total of a group
    is its plain error, as if the errors of layers added up. ViDiT-Q quantizes each group at once
    for that (2406.02540, sec. 3.4); the sum over layers is ours, and needs no forward passes of its
    own. If a metric is zero in a whole group, ``mse`` replaces it there.

    Args:
        measured: from :func:`measure`; options mean the same for every item.
        groups: item to a key of ``METRICS``.
        per_group_metric: otherwise ``d = mse``.

    Returns:
        Item, option to sensitivity, infinite where an output is not finite.
    """
    plain = {i: {o: m["mse"] for o, m in options.items()} for i, options in measured.items()}
    if not per_group_metric:
        return plain
    ranks = {i: {o: m[groups[i]] for o, m in options.items()} for i, options in measured.items()}
    error_sums: dict[tuple[str, str], float] = {}
    rank_sums: dict[tuple[str, str], float] = {}
    for item, options in ranks.items():
        for option, rank in options.items():
            if math.isfinite(rank + plain[item][option]):
                key = groups[item], option
                error_sums[key] = error_sums.get(key, 0.0) + plain[item][option]
                rank_sums[key] = rank_sums.get(key, 0.0) + rank

    def sensitivity(item: str, option: str) -> float:
        key, rank, error = (groups[item], option), ranks[item][option], plain[item][option]
        if not math.isfinite(rank + error):
            return math.inf
        return error_sums[key] * (rank / rank_sums[key]) if rank_sums[key] else error

    return {i: {o: sensitivity(i, o) for o in options} for i, options in measured.items()}
