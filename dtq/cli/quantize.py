# SPDX-License-Identifier: Apache-2.0
"""``dtq quantize``, ``dtq plan`` and ``dtq calibrate``: from a float model to a quantized folder."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from dtq.allocate import parse_size
from dtq.api import open_runs, run_stages
from dtq.calibrate import store
from dtq.calibrate.observers import OBSERVERS
from dtq.checkpoint import reader, writer
from dtq.cli.options import memory_option, model_options, quiet, recipe_options, recipe_with
from dtq.cli.output import plan_json, print_plan, print_result, size
from dtq.errors import InputError
from dtq.estimate.hardware import reading_time
from dtq.estimate.size import estimate
from dtq.io.memory import tune_malloc
from dtq.io.safe_parse import finite_or_null
from dtq.pipelines import loading
from dtq.plan.layers import Plan
from dtq.runs.run_dir import run_directory
from dtq.runs.workers import Workers
from dtq.stages import plan as stages
from dtq.stages.calibrate import collect, statistics_needed
from dtq.stages.run import Run
from dtq.stages.run_identity import run_identity

fresh_option = click.option(
    "--fresh", is_flag=True, help="Forget what an interrupted run finished."
)


@click.command()
@click.argument("model")
@recipe_options
@model_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
@click.option("--stats", type=click.Path(path_type=Path), help="Statistics from dtq calibrate.")
@click.option(
    "--keep",
    multiple=True,
    metavar="LAYER",
    help="Layer to keep: name, prefix, component or re:PATTERN.",
)
@memory_option
@click.option("--shard-size", default="10GB", show_default=True, help="Largest safetensors file.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that is not empty.")
@fresh_option
@click.option(
    "--sentinel/--no-sentinel",
    default=True,
    show_default=True,
    help="A short run at the end, beside the float model; layers that fail in it are promoted.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, no progress bars.")
def quantize(
    model: str,
    output: Path,
    stats: Path | None,
    keep: tuple[str, ...],
    memory: str | None,
    shard_size: str,
    overwrite: bool,
    fresh: bool,
    sentinel: bool,
    as_json: bool,
    dtype: str,
    components: tuple[str, ...],
    **choices: Any,
) -> None:
    """Quantize MODEL and write a diffusers folder.

    A run that was interrupted goes on when the same command is given again.

    \b
    dtq quantize demo --recipe w4a8 -o demo-w4a8
    dtq quantize black-forest-labs/FLUX.1-dev --recipe w4a8 -o flux-w4a8
    dtq quantize demo --recipe w4a8 --set modulation=w4a16 -o small
    """
    tune_malloc()
    chosen = recipe_with(choices)
    team = Workers.join()
    statistics = store.load(stats) if stats else None
    started = time.monotonic()
    with (
        quiet(as_json or not team.is_main),
        run_directory(output, team, fresh=fresh, overwrite=overwrite) as directory,
    ):
        if directory.finished:
            told = (output / "dtq_report.json").read_text(encoding="utf-8")
            click.echo(told if as_json else f"{output}: the run before had finished it")
            return
        runs = open_runs(
            loading.load_transformers(model, dtype=dtype, component=components or "auto"),
            chosen,
            tasks=directory.tasks,
            statistics=statistics,
            exclude=keep,
            progress=team.is_main and not as_json,
            check=sentinel,
        )
        for run in runs:
            stages.plan(run)
            _check_disk(run.model, run.plan, run.loaded.dtype, output)
        inputs = run_identity(runs, chosen.needs(), stats) if team.is_main else {}
        directory.begin(inputs, parse_size(memory) if memory else None)
        for run in runs:
            run.memory = directory.memory
        del statistics
        reports = run_stages(runs)
        if not team.is_main:
            return
        first = runs[0].loaded
        saveable = first.pipeline if first.pipeline is not None else first.model
        data: dict[str, Any] = {name: report.to_json() for name, report in reports.items()}
        if len(data) == 1:
            (data,) = data.values()
        data = finite_or_null(data)
        with directory.result() as side:
            writer.save_into(saveable, side, shard_size, data if len(reports) == 1 else None)
            text = json.dumps(data, indent=1) + "\n"
            (side / "dtq_report.json").write_text(text, encoding="utf-8")
    if as_json:
        click.echo(json.dumps(data))
        return
    for name, report in reports.items():
        if len(reports) > 1:
            click.echo(f"{name}:")
        print_result(report, output, time.monotonic() - started)


@click.command()
@click.argument("model")
@recipe_options
@model_options
@click.option("--keep", multiple=True, metavar="LAYER", help="Layer to keep.")
@memory_option
@click.option("--json", "as_json", is_flag=True, help="The whole plan as JSON.")
def plan(
    model: str,
    components: tuple[str, ...],
    dtype: str,
    keep: tuple[str, ...],
    memory: str | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Show what would happen to each layer, and what it costs, without loading weights.

    \b
    dtq plan demo --recipe w4a8
    """
    tune_malloc()
    chosen = recipe_with(choices)
    every: dict[str, dict[str, Any]] = {}
    found = loading.meta_models(model, components or "auto")
    folder = Path(model)
    driven = not folder.exists() or loading.folder_kind(folder) == "pipeline"
    for name, (skeleton, on_disk) in found.items():
        compute = on_disk if dtype == "auto" else loading.DTYPES[dtype]
        run = Run(loading.LoadedModel(model, None, name, skeleton), chosen, exclude=keep)
        stages.plan(run)
        scan, resolved = run.scan, run.plan
        cost = estimate(
            skeleton,
            scan,
            resolved,
            chosen,
            compute,
            needs=statistics_needed(chosen, driven),
            memory=parse_size(memory) if memory else psutil.virtual_memory().available // 2,
            mapped=compute == on_disk,
            driven=driven,
            reading=reading_time(folder, name) if compute == on_disk else 0.0,
        )
        if as_json:
            every[name] = plan_json(resolved, cost, scan)
            continue
        if len(found) > 1:
            click.echo(f"{name}:")
        print_plan(resolved, cost, scan, chosen)
    if as_json:
        click.echo(json.dumps(every if len(every) > 1 else next(iter(every.values()))))


@click.command()
@click.argument("model")
@recipe_options
@model_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="File to write, .safetensors.",
)
@fresh_option
def calibrate(
    model: str,
    output: Path,
    fresh: bool,
    dtype: str,
    components: tuple[str, ...],
    **choices: Any,
) -> None:
    """Run the float model once and keep its statistics for any number of recipes.

    A run that was interrupted goes on when the same command is given again.

    \b
    dtq calibrate demo -o demo-stats.safetensors
    dtq quantize demo --recipe w4a8 --stats demo-stats.safetensors -o demo-w4a8
    """
    tune_malloc()
    chosen = recipe_with(choices)
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    team = Workers.join()
    with quiet(not team.is_main), run_directory(output, team, fresh=fresh, file=True) as directory:
        every = loading.load_transformers(model, dtype=dtype, component=components or "auto")
        if len(every) > 1:
            found = ", ".join(each.component for each in every)
            raise InputError(
                f"{model} has several transformers: choose one of {found} by --component"
            )
        run = Run(every[0], chosen, directory.tasks, progress=team.is_main)
        stages.plan(run)
        # everything, whatever this recipe needs: the file then serves other recipes too
        needs = frozenset(OBSERVERS)
        directory.begin(run_identity([run], needs) if team.is_main else {})
        run.memory = directory.memory
        statistics = collect(run, needs)
        if not team.is_main:
            return
        store.save(statistics, output)
    click.echo(
        f"{output}: {len(statistics.inputs)} inputs, {statistics.about['calls']} model calls, {size(output.stat().st_size)}"
    )


def _check_disk(model: torch.nn.Module, plan: Plan, dtype: torch.dtype, output: Path) -> None:
    """Say early that the disk is too full, not after the work."""
    from dtq.estimate.size import file_tensors

    parent = output.resolve()
    while not parent.exists():
        parent = parent.parent
    needed = reader.predicted_bytes(file_tensors(model, plan, dtype))
    free = shutil.disk_usage(parent).free
    if free < 1.1 * needed:
        raise InputError(f"{parent}: {size(free)} free, the checkpoint needs {size(needed)}")
