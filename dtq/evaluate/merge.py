# SPDX-License-Identifier: Apache-2.0
"""Evaluation in several processes: each runs some of the samples, the main process merges them.

Whole batches are assigned to processes, so every sample is in the same batch as in a run of one
process. Merged values are in the order of the samples. The metrics are therefore bit-identical to
those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtq.evaluate import run_file, trajectory
from dtq.evaluate.paired_run import CandidateRun, Errors
from dtq.runs.gather import check_ids, gather
from dtq.runs.workers import Workers


def by_step(errors: Errors) -> list[float]:
    """Mean of each step; errors are added in the order of the samples."""
    ordered = sorted(errors, key=lambda row: row[0])
    return trajectory.mean_by_step([(step, error) for _, step, error in ordered])


def merge_shards(workers: Workers, folder: Path | None, shard: CandidateRun) -> CandidateRun | None:
    """Merge the shards of all processes.

    Args:
        workers: the processes.
        folder: through which they exchange files; one process needs none.
        shard: of this process.

    Returns:
        The merged shard in the main process, None in the others.

    Raises:
        WorkerError: a sample is missing or duplicated; the message names it.
    """
    if workers.size == 1:
        return shard
    tables = {**shard.errors, "": shard.divergence}
    tensors = {f"errors.{k}": torch.tensor(v, dtype=torch.float64) for k, v in tables.items()}
    gathered = gather(workers, folder, "samples", tensors | shard.images, shard.run.to_json())
    if gathered is None:
        return None
    return _merged([_shard(*pair) for pair in gathered])


def _shard(tensors: Mapping[str, Tensor], run: Any) -> CandidateRun:
    sides = ("float", "candidate", "rerun")
    images = {side: tensors[side] for side in sides if side in tensors}
    rows = {k.removeprefix("errors."): t.tolist() for k, t in tensors.items() if k not in images}
    tables = {name: [(int(p), int(s), e) for p, s, e in table] for name, table in rows.items()}
    divergence = tables.pop("")
    return CandidateRun(run_file.parse(run), tables, divergence, images)


def _merged(shards: Sequence[CandidateRun]) -> CandidateRun:
    first, runs = shards[0], [shard.run for shard in shards]
    samples = [sample for run in runs for sample in run.samples]
    count = first.run.conditions["samples"]
    check_ids([sample.id for sample in samples], count)
    order = sorted(range(count), key=lambda i: int(samples[i].id))
    conditions = {**first.run.conditions, "processes": len(shards)}
    if "calls" in conditions:
        calls = [run.conditions["calls"] for run in runs]
        conditions["calls"] = {name: sum(each[name] for each in calls) for name in calls[0]}
    run = replace(
        first.run,
        conditions=conditions,
        samples=[samples[i] for i in order],
        values=_tables([run.values for run in runs]),
        rerun=_tables([run.rerun for run in runs]),
        failures=_ordered([run.failures for run in runs]),
        missing={name: reason for run in runs for name, reason in run.missing.items()},
    )
    return CandidateRun(
        run,
        {name: [row for shard in shards for row in shard.errors[name]] for name in first.errors},
        [row for shard in shards for row in shard.divergence],
        {side: torch.cat([s.images[side] for s in shards])[order] for side in first.images},
    )


def _tables(shards: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Values of all samples by metric, in the order of the ids."""
    return {name: _ordered([shard.get(name, {}) for shard in shards]) for name in shards[0]}


def _ordered(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    items = [item for shard in shards for item in shard.items()]
    return dict(sorted(items, key=lambda item: int(item[0])))
