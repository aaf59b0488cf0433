# SPDX-License-Identifier: Apache-2.0
"""Calibration that resumes after a crash and is shared by processes: shards, summed in one file.

The recipe alone splits the batches into shards. Process r of R runs shards r, r + R, and so on;
then the processes add their statistics to the file one after another, in the order of the shards. A
sum of floats depends on its order, and this order is always the same: the file has the same bytes
however many processes there are, and wherever one of them was killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtq.calibrate import store
from dtq.calibrate.collection import Statistics
from dtq.calibrate.engine import CalibrationRun, collect_shard
from dtq.calibrate.gradients import Observed
from dtq.errors import CheckpointError
from dtq.io.checksum import bytes_digest
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.settings import SamplingSettings
from dtq.runs.tasks import TaskStore


def calibrate_in_shards(
    loaded: LoadedModel,
    observed: Sequence[Observed],
    settings: SamplingSettings,
    needs: frozenset[str],
    run: CalibrationRun,
    tasks: TaskStore,
    *,
    progress: bool = True,
) -> Path:
    """Make the file with the statistics of some input groups, or continue it.

    It is one task, a sum over the shards: a file per shard would take as many times the disk.

    Args:
        loaded: the float model.
        observed: from :func:`~dtq.calibrate.engine.observed_of`.
        settings: how the model is sampled, and the number of shards.
        needs: statistics to collect, names of ``observers.OBSERVERS``.
        run: from :func:`~dtq.calibrate.engine.calibration_run`.
        tasks: in a folder.
        progress: show a bar.

    Returns:
        The file, which :func:`dtq.calibrate.store.load` reads.

    Raises:
        WorkerError: another process died.
    """
    shards, workers = run.shards(settings.num_shards), tasks.workers
    names = "\n".join([*(each.name for each in observed), *sorted(needs)])
    path = tasks.path(f"statistics/{bytes_digest(names.encode())[:16]}")
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    done = workers.broadcast(_shards_in(path) if workers.is_main else 0)
    for first in range(done, len(shards), workers.size):
        mine, end = first + workers.rank, min(first + workers.size, len(shards))
        shard = None
        if mine < end:
            shard = collect_shard(
                loaded, observed, settings, needs, run, shards[mine], progress=progress
            )
        for index in range(first, end):
            if index == mine and shard is not None:
                _add(path, shard, index)
            tasks.barrier()
    return path


def _shards_in(path: Path) -> int:
    """How many shards a file is the sum of, 0 when there is none."""
    if not path.exists():
        return 0
    try:
        return int(store.load(path).about["num_shards"])
    except CheckpointError:
        path.unlink()  # damaged by a crash of the whole machine; computed again
        return 0


def _add(path: Path, shard: Statistics, index: int) -> None:
    """Add shard number ``index`` to those before it; ``shard`` is emptied, group by group."""
    about, inputs = shard.about, dict(shard.inputs)
    shard.inputs = {}
    if index:
        before = store.load(path)
        for name in list(inputs):
            stats = before.inputs[name]
            stats.merge(inputs.pop(name))
            inputs[name] = stats
        about = {**about, "calls": before.about["calls"] + about["calls"]}
    store.save(Statistics(inputs, shard.edges, {**about, "num_shards": index + 1}), path)
