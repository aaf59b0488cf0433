# SPDX-License-Identifier: Apache-2.0
"""Evaluation by several processes: each makes some of the samples, the first puts them together.

Whole batches are dealt out, so a sample is made in the company that it has in one process, and what
is put together is in the order of the places: the figures are those of one process, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtq.evaluate import run_file, trajectory
from dtq.evaluate.paired_run import CandidateRun, EvaluationJob
from dtq.evaluate.run_file import Run
from dtq.runs.gather import check_ids, gather
from dtq.runs.workers import Workers

Errors = list[tuple[int, int, float]]
"""Place of a batch, step, and error, of each call."""


@dataclass
class RunShard:
    """What one process found, or all of them.

    Attributes:
        run: values of its samples.
        errors: teacher-forced, by row of the report.
        divergence: free-running.
        floats, made: pictures of the two models, one for each sample.
    """

    run: Run
    errors: dict[str, Errors]
    divergence: Errors
    floats: Tensor
    made: Tensor

    @classmethod
    def of(cls, job: EvaluationJob, seen: CandidateRun) -> RunShard:
        """Of a candidate; rows of others are added to ``errors``."""
        errors = {seen.run.candidate: placed(job, trajectory.call_errors(job.truth, seen.outputs))}
        return cls(
            seen.run,
            errors,
            placed(job, trajectory.free_running(job.truth, seen.ran)),
            torch.cat(job.truth.pictures),
            torch.cat(seen.ran.pictures),
        )


def placed(job: EvaluationJob, errors: Sequence[tuple[int, float]]) -> Errors:
    """Errors of the calls of ``job.truth`` with the place that their batch begins at."""
    found, at, batch = [], 0, -1
    for step, error in errors:
        if step == 0:
            at += len(job.truth.pictures[batch]) if batch >= 0 else 0
            batch += 1
        found.append((job.places[at], step, error))
    return found


def by_step(errors: Errors) -> list[float]:
    """Mean of each step, in the order of the places."""
    ordered = sorted(errors, key=lambda each: each[0])
    return trajectory.mean_by_step([(step, error) for _, step, error in ordered])


def merge_shards(
    workers: Workers, folder: Path | None, share: RunShard, count: int
) -> RunShard | None:
    """The shares of all processes as one, on the first process; None elsewhere.

    Args:
        team, folder: as for :func:`gather`.
        share: of this process.
        count: samples that there must be.

    Raises:
        TeamError: a sample is missing, or was made twice; names it.
    """
    if workers.size == 1:
        return share
    tensors = {"floats": share.floats, "made": share.made}
    tables = {**share.errors, "": share.divergence}
    tensors |= {f"errors.{k}": torch.tensor(v, dtype=torch.float64) for k, v in tables.items()}
    found = gather(workers, folder, "samples", tensors, share.run.to_json())
    if found is None:
        return None
    return _together([_share(*each) for each in found], count)


def _share(tensors: Mapping[str, Tensor], run: Any) -> RunShard:
    tables = {
        key.removeprefix("errors."): [(int(p), int(s), e) for p, s, e in table.tolist()]
        for key, table in tensors.items()
        if key.startswith("errors.")
    }
    divergence = tables.pop("")
    return RunShard(run_file.parse(run), tables, divergence, tensors["floats"], tensors["made"])


def _together(shares: Sequence[RunShard], count: int) -> RunShard:
    ids = [sample.id for share in shares for sample in share.run.samples]
    check_ids(ids, count)
    order = sorted(range(count), key=lambda i: int(ids[i]))
    first, runs = shares[0], [share.run for share in shares]
    samples = [sample for run in runs for sample in run.samples]
    conditions = {**first.run.conditions, "processes": len(shares)}
    if "calls" in conditions:
        calls: Counter[str] = Counter()
        for run in runs:
            calls.update(run.conditions["calls"])
        conditions["calls"] = {name: calls[name] for name in conditions["calls"]}
    run = replace(
        first.run,
        conditions=conditions,
        samples=[samples[i] for i in order],
        values=_tables([run.values for run in runs]),
        rerun=_tables([run.rerun for run in runs]),
        failures=_ordered([run.failures for run in runs]),
        missing={name: why for run in runs for name, why in run.missing.items()},
    )
    return RunShard(
        run,
        {row: [each for share in shares for each in share.errors[row]] for row in first.errors},
        [each for share in shares for each in share.divergence],
        torch.cat([share.floats for share in shares])[order],
        torch.cat([share.made for share in shares])[order],
    )


def _tables(parts: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Metrics of all samples, in the order of the ids."""
    return {metric: _ordered([part.get(metric, {}) for part in parts]) for metric in parts[0]}


def _ordered(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    items = [item for part in parts for item in part.items()]
    return dict(sorted(items, key=lambda item: int(item[0])))
