# SPDX-License-Identifier: Apache-2.0
"""``dtq calibrate``: statistics of a float model, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dtq.cli import options as opt
from dtq.cli.output import size
from dtq.errors import InputError


@click.command()
@click.argument("model")
@opt.recipe
@opt.model
@opt.output(required=True, help="File to write, .safetensors.")
@opt.fresh
def calibrate(
    model: str,
    output: Path,
    fresh: bool,
    dtype: str,
    variant: str | None,
    components: tuple[str, ...],
    **choices: Any,
) -> None:
    """Collect statistics of the float MODEL in a file.

    The file serves any number of recipes. MODEL is a local diffusers folder, a hub id, or a bundled model: demo, demo-outliers,
    demo-video, demo-text, demo-text-4step. If a run was interrupted, the same command continues it.

    \b
    dtq calibrate demo -o demo-stats.safetensors
    dtq quantize demo --recipe w4a8 --stats demo-stats.safetensors -o demo-w4a8
    """
    from dtq.calibrate import store
    from dtq.calibrate.gradients import is_part
    from dtq.calibrate.observers import OBSERVERS
    from dtq.cli.inputs import join_workers, recipe_with, size_of_budget
    from dtq.io.memory import tune_malloc
    from dtq.pipelines.loading import load_transformers
    from dtq.runs.run_dir import run_directory
    from dtq.stages.calibrate import collect
    from dtq.stages.plan import plan
    from dtq.stages.run import Run
    from dtq.stages.run_identity import run_identity

    tune_malloc()
    recipe = recipe_with(choices)
    if size_of_budget(choices):
        raise InputError("statistics do not depend on a size: give --budget to dtq quantize")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    workers = join_workers(output)
    with run_directory(output, workers, fresh=fresh, file=True) as directory:
        models = load_transformers(
            model, dtype=dtype, component=components or "auto", variant=variant
        )
        if len(models) > 1:
            names = ", ".join(each.component for each in models)
            raise InputError(f"{model} has several transformers: choose one --component of {names}")
        run = Run(models[0], recipe, directory.tasks, progress=workers.is_main)
        plan(run)
        # everything, whatever this recipe needs: the file then serves other recipes too
        needs = frozenset(OBSERVERS) | {"gradients"}
        directory.begin(run_identity([run], needs) if workers.is_main else {})
        run.memory = directory.memory
        statistics = collect(run, needs)
        if not workers.is_main:
            return
        store.save(statistics, output)
    calls, stored = statistics.about["calls"], size(output.stat().st_size)
    inputs = sum(not is_part(name) for name in statistics.inputs)
    click.echo(f"{output}: {inputs} inputs, {calls} model calls, {stored}")
