# SPDX-License-Identifier: Apache-2.0
"""Stage: run the float model and collect statistics."""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from dtq.calibrate import engine, store
from dtq.calibrate.collection import Statistics
from dtq.calibrate.distributed import calibrate_in_shards
from dtq.errors import InputError
from dtq.io.memory import paged_weights
from dtq.models import Scan
from dtq.pipelines.loading import LoadedModel, modules_of
from dtq.recipe.resolve import Recipe
from dtq.runs.tasks import TaskStore
from dtq.transforms import TRANSFORMS

log = logging.getLogger("dtq")


def calibrate_source(
    loaded: LoadedModel,
    scan: Scan,
    recipe: Recipe,
    needs: frozenset[str],
    *,
    inputs: Iterable[dict[str, Any]] | None = None,
    progress: bool = True,
    memory: int | None = None,
    tasks: TaskStore | None = None,
) -> Statistics:
    """Run the float model over the recipe's calibration set.

    Once, if the statistics fit in ``memory`` bytes (default: half of what is free); else as often
    as it takes, each time for as many inputs as fit, and they wait on disk. Each part of the set
    that is seen is kept in ``work``.
    """
    tasks = tasks or TaskStore()
    plan = recipe.plan(scan)
    sites = [s for s in scan.input_groups if any(not plan[x.name].unquantized for x in s.linears)]
    how = recipe.calibration
    memory = memory or psutil.virtual_memory().available // 2
    portions = engine.memory_batches(sites, how.num_timestep_bins, needs, memory)
    calls = None if inputs is None else list(inputs)
    with paged_weights(*modules_of(loaded)):
        if len(portions) == 1 and tasks.folder is None:
            return engine.calibrate(loaded, sites, how, needs, inputs=calls, progress=progress)
        if len(portions) > 1:
            log.warning(
                "the statistics of %d inputs do not fit in %.1f GB: the float model runs %d times",
                len(sites), memory / 1e9, len(portions),
            )  # fmt: skip
        folder = None
        if tasks.folder is None:
            folder = tempfile.TemporaryDirectory(prefix="dtq-statistics-")
            tasks = TaskStore(Path(folder.name))
        runs = engine.calibration_run(loaded, how, calls)
        files = [
            calibrate_in_shards(loaded, portion, how, needs, runs, tasks, progress=progress)
            for portion in portions
        ]
    statistics = engine.fill_from_sibling_experts(
        store.load(*files)
    )  # a sibling may be in another portion
    if folder is not None:
        weakref.finalize(statistics, folder.cleanup)
    return statistics


def statistics_needed(recipe: Recipe, driven: bool) -> frozenset[str]:
    """The statistics that are collected for a recipe.

    Weight-only recipes whose transform needs none lose little without data: where no pipeline and
    no inputs drive the model they do without.
    """
    without = not TRANSFORMS[recipe.transform.name].needs
    data_free = recipe.activations == "none" and without and not recipe.rules
    return recipe.needs() if driven or not data_free else frozenset()


def _check_statistics(statistics: Statistics, scan: Scan, needs: frozenset[str]) -> None:
    for site in scan.input_groups:
        stats = statistics.inputs.get(site.name)
        if stats is None:
            continue
        if stats.columns != site.columns:
            raise InputError(f"the statistics are of another model: {site.name} differs in width")
        missing = [
            n for n in sorted(needs) if n in ("hessian", "sample") and getattr(stats, n) is None
        ]
        if missing:
            raise InputError(
                f"the statistics lack {', '.join(missing)}; calibrate with this recipe"
            )
    if not any(site.name in statistics.inputs for site in scan.input_groups):
        raise InputError("the statistics are of another model: no layer name matches")
