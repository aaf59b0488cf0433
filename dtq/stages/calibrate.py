# SPDX-License-Identifier: Apache-2.0
"""Stage: run the float model and collect statistics of its inputs."""

from __future__ import annotations

import logging
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import psutil

from dtq.calibrate import engine, store
from dtq.calibrate.collection import Statistics
from dtq.calibrate.distributed import calibrate_in_shards
from dtq.calibrate.gradients import is_part
from dtq.errors import InputError
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io.memory import paged_weights
from dtq.pipelines.loading import modules_of
from dtq.plan.layers import LayerPlan
from dtq.recipe import Recipe
from dtq.runs.tasks import TaskStore
from dtq.stages.run import Run
from dtq.transforms import TRANSFORMS

log = logging.getLogger("dtq")


def calibrate(run: Run) -> None:
    """Collect the statistics that the recipe needs, or check those that were given.

    Raises:
        InputError: the given statistics are of another model, or lack something.
    """
    needs = run.recipe.needs()
    if run.statistics is not None:
        _check(run, needs)
    elif statistics_needed(run.recipe, run.has_data):
        run.statistics = collect(run, needs)
    elif needs:
        solver = run.recipe.solver.name
        log.warning("no calibration data: solver %s falls back to clip search", solver)
    if run.statistics is not None:
        run.plan = run.plan.with_layers(_without_rows(run))
    run.report.edges = run.edges
    if run.statistics is not None:
        run.report.calibration = dict(run.statistics.about)


def collect(run: Run, needs: frozenset[str]) -> Statistics:
    """Run the float model over the recipe's calibration set.

    The model runs once if the statistics fit in ``run.memory`` bytes. If they do not, it runs once
    for each batch of input groups that fits, and the statistics wait on disk. Every shard of the
    calibration set is a task.

    Args:
        run: a planned run.
        needs: keys of ``OBSERVERS``.
    """
    wanted = {layer.name for layer in run.recipe.plan(run.scan).quantized()}
    observed = engine.observed_of(run.scan.input_groups, wanted, needs)
    loaded, settings, tasks = run.loaded, run.recipe.calibration, run.tasks
    memory = run.memory or psutil.virtual_memory().available // 2
    batches = engine.memory_batches(observed, settings.num_timestep_bins, needs, memory)
    with paged_weights(*modules_of(loaded)):
        if len(batches) == 1 and tasks.folder is None:
            return engine.calibrate(
                loaded, observed, settings, needs, inputs=run.inputs, progress=run.progress
            )
        if len(batches) > 1:
            log.warning(
                "the statistics of %d inputs do not fit in %.1f GB: the float model runs %d times",
                len(observed), memory / 1e9, len(batches),
            )  # fmt: skip
        folder = None
        if tasks.folder is None:
            folder = tempfile.TemporaryDirectory(prefix="dtq-statistics-")
            tasks = TaskStore(Path(folder.name))
        calls = engine.calibration_run(loaded, settings, run.inputs)
        files = [
            calibrate_in_shards(loaded, batch, settings, needs, calls, tasks, progress=run.progress)
            for batch in batches
        ]
    # a sibling expert may be in another batch
    statistics = engine.fill_from_sibling_experts(store.load(*files))
    if folder is not None:
        weakref.finalize(statistics, folder.cleanup)
    return statistics


def statistics_needed(recipe: Recipe, has_data: bool) -> frozenset[str]:
    """The statistics that are collected for a recipe.

    Weight-only recipes whose transform needs none lose little without data: they do without where
    no pipeline and no inputs call the model.
    """
    transform_needs_none = not TRANSFORMS[recipe.transform.name].needs
    data_free = recipe.activations == "none" and transform_needs_none and not recipe.rules
    return recipe.needs() if has_data or not data_free else frozenset()


def _without_rows(run: Run) -> dict[str, LayerPlan]:
    """Layers that no row reached, by name: a static activation scale cannot be chosen for them."""
    note = "no row reached it in calibration: quantized without data"
    changed = {}
    without_inputs = {x.name for x in (*run.plan.convolutions(), *run.plan.tables())}
    for layer in (x for x in run.plan.quantized() if x.name not in without_inputs):
        if run.stats(run.scan.group_of(layer.name)) is None:
            activations = ACTIVATION_FORMATS[layer.activation_format]
            name = f"int{activations.bits}-row" if activations.static else activations.name
            changed[layer.name] = replace(layer.with_spec(activation_format=name), note=note)
    return changed


def _check(run: Run, needs: frozenset[str]) -> None:
    """Refuse statistics of another model, and those that lack what the recipe needs."""
    for group in run.scan.input_groups:
        stats = run.stats(group.name)
        if stats is None:
            continue
        if stats.columns != group.columns:
            raise InputError(f"the statistics are of another model: {group.name} differs in width")
        optional = sorted(needs & {"hessian", "sample"})
        missing = [name for name in optional if getattr(stats, name) is None]
        if missing:
            raise InputError(
                f"the statistics lack {', '.join(missing)}; calibrate with this recipe"
            )
    given = run.statistics.inputs if run.statistics is not None else ()
    if "gradients" in needs and not any(map(is_part, given)):
        raise InputError("the statistics lack gradients; calibrate with this recipe")
    if all(run.stats(group.name) is None for group in run.scan.input_groups):
        raise InputError("the statistics are of another model: no layer name matches")
