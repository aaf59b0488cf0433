# SPDX-License-Identifier: Apache-2.0
"""Calibration that survives a crash and is shared by processes: parts, added up in one file.

The batches are cut into parts by the recipe alone. Process r of R sees parts r, r + R, and so on;
then they add what they saw to the file one after another, in order of the parts. Sums of floats
depend on their order, and here the order is always the same: the file has the same numbers however
many processes there are, and wherever one of them was killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtq.calibrate import store
from dtq.calibrate.collection import Statistics
from dtq.calibrate.engine import CalibrationRun, collect_shard
from dtq.errors import CheckpointError
from dtq.io.checksum import bytes_digest
from dtq.models import InputGroup
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.settings import SamplingSettings
from dtq.runs.tasks import TaskStore


def calibrate_in_shards(
    loaded: LoadedModel,
    input_groups: Sequence[InputGroup],
    settings: SamplingSettings,
    needs: frozenset[str],
    runs: CalibrationRun,
    tasks: TaskStore,
    *,
    progress: bool = True,
) -> Path:
    """The file with the statistics of some sites; goes on where an earlier run stopped.

    Args:
        source, sites, calibration, needs: as for ``engine.calibrate``.
        runs: from ``engine.drive``.
        work: in a folder.
        progress: show a bar.

    Raises:
        TeamError: another process died.
    """
    parts, team = runs.shards(settings.num_shards), tasks.workers
    names = "\n".join([*(site.name for site in input_groups), *sorted(needs)])
    path = tasks.path(f"statistics/{bytes_digest(names.encode())[:16]}")
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    done = team.broadcast(_parts_in(path) if team.is_main else 0)
    for first in range(done, len(parts), team.size):
        mine, end = first + team.rank, min(first + team.size, len(parts))
        seen = None
        if mine < end:
            seen = collect_shard(
                loaded, input_groups, settings, needs, runs, parts[mine], progress=progress
            )
        for turn in range(first, end):
            if turn == mine and seen is not None:
                _add(path, seen, turn)
            team.barrier()
    return path


def _parts_in(path: Path) -> int:
    """How many parts a file has, 0 when there is none."""
    if not path.exists():
        return 0
    try:
        return int(store.load(path).about["num_shards"])
    except CheckpointError:
        path.unlink()  # what a crash of the whole machine left; seen again
        return 0


def _add(path: Path, seen: Statistics, place: int) -> None:
    """Add part number ``place`` to those before it; ``seen`` is emptied, site by site."""
    about, sites = seen.about, dict(seen.inputs)
    seen.inputs = {}
    if place:
        before = store.load(path)
        for name in list(sites):
            site = before.inputs[name]
            site.merge(sites.pop(name))
            sites[name] = site
        about = {**about, "calls": before.about["calls"] + about["calls"]}
    store.save(Statistics(sites, seen.edges, {**about, "num_shards": place + 1}), path)
