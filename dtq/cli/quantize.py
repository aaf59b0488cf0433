# SPDX-License-Identifier: Apache-2.0
"""``dtq quantize``: from a float model to a quantized folder."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtq.cli import options as opt
from dtq.cli.output import size
from dtq.cli.quantize_output import print_result

if TYPE_CHECKING:
    from dtq.runs.run_dir import RunDirectory
    from dtq.stages.pipeline_sizes import PipelineBudget
    from dtq.stages.report import Report
    from dtq.stages.run import Run


# fmt: off
_options = opt.combined(
    opt.recipe,
    opt.model,
    opt.output(required=True, help="Folder to write."),
    opt.path("--stats", help="Statistics file from dtq calibrate. Default: calibrate now."),
    opt.target,
    opt.text_encoder,
    opt.embeddings,
    opt.vae,
    opt.exclude,
    opt.memory,
    click.option("--shard-size", default="10GB",
                 help="Size limit of one safetensors file, such as 500MB."),
    opt.flag("--overwrite", help="Replace a folder that is not empty."),
    opt.fresh,
    click.option("--config", "source_config", metavar="FOLDER", type=click.Path(path_type=Path),
                 help="For a MODEL that is a file of another engine: folder of its diffusers "
                      "pipeline, which calibrates, or of the model's config. Default: the config "
                      "in the file, and random inputs."),
    click.option("--sanity-check/--no-sanity-check", default=True,
                 help="Compare a short sampling run with the float model at the end, and promote the "
                      "layers that fail."),
    opt.json(help="Print the report as JSON, without progress bars."),
)
# fmt: on


@click.command()
@click.argument("model")
@_options
def quantize(
    model: str,
    output: Path,
    stats: Path | None,
    target: str,
    text_encoder: str | None,
    exclude: tuple[str, ...],
    memory: str | None,
    shard_size: str,
    overwrite: bool,
    fresh: bool,
    source_config: Path | None,
    sanity_check: bool,
    vae: str | None,
    as_json: bool,
    dtype: str,
    variant: str | None,
    components: tuple[str, ...],
    **choices: Any,
) -> None:
    """Quantize MODEL and write a diffusers folder.

    MODEL is a local diffusers folder, a hub id, a file of another engine (dtq export --list), or a
    bundled model: demo, demo-outliers, demo-video, demo-text, demo-text-4step. If a run was
    interrupted, the same command continues it. With --to, OUTPUT/engines also gets the file of that
    engine.

    \b
    dtq quantize demo --recipe w4a8 -o demo-w4a8
    dtq quantize black-forest-labs/FLUX.1-dev --recipe w4a8 -o flux-w4a8
    dtq quantize demo --recipe w4a8 --set modulation=w4a16 -o small
    dtq quantize demo-video --recipe w4a8 --text-encoder w8a8 -o video
    dtq quantize black-forest-labs/FLUX.1-dev --recipe w4a8 --budget 12GB -o flux-12gb
    dtq quantize demo --recipe convrot-w8a8 --to comfy-int8 -o demo-int8
    """
    from dtq.api import open_runs, run_stages
    from dtq.calibrate import store
    from dtq.cli.inputs import check_names, join_workers, recipe_with, size_of_budget, source_of
    from dtq.io.memory import tune_malloc
    from dtq.pipelines.loading import load_transformers
    from dtq.runs.run_dir import run_directory
    from dtq.stages.pipeline_sizes import PipelineBudget

    tune_malloc()
    recipe = recipe_with(choices)
    check_names(target, text_encoder)
    budget = PipelineBudget.of(size_of_budget(choices), vae, text_encoder)
    workers = join_workers(output, silent=as_json)
    statistics = store.load(stats) if stats else None
    started = time.monotonic()
    with run_directory(output, workers, fresh=fresh, overwrite=overwrite) as directory:
        if directory.finished:
            _print_finished(output, as_json)
            return
        source = source_of(model, source_config, dtype)
        runs = open_runs(
            load_transformers(source, dtype=dtype, component=components or "auto", variant=variant),
            recipe,
            tasks=directory.tasks,
            statistics=statistics,
            exclude=exclude,
            progress=workers.is_main and not as_json,
            check=sanity_check,
            target=target,
            text_encoder=text_encoder,
            embeddings=choices["embeddings"],
            budget=budget,
        )
        _plan(runs, output, vae, budget, text_encoder)
        _begin(directory, runs, memory, stats, _of_pipeline(vae, budget, text_encoder))
        del statistics
        reports = run_stages(runs, budget)
        if not workers.is_main:
            return
        data = _save(directory, runs, reports, shard_size, vae, budget, text_encoder)
    if as_json:
        click.echo(json.dumps(data))
    else:
        seconds = time.monotonic() - started
        print_result(runs[0].loaded, reports, data, output, seconds, target)


def _of_pipeline(
    vae: str | None, budget: PipelineBudget | None, text_encoder: str | None
) -> dict[str, Any]:
    """What was asked for the pipeline as a whole, as inputs of the run; None is left out."""
    from dtq.recipe.resolve import BNB_NF4

    nf4 = True if text_encoder == BNB_NF4 else None
    return {"vae": vae, "budget": budget and budget.bytes, "nf4": nf4}


def _begin(
    directory: RunDirectory,
    runs: list[Run],
    memory: str | None,
    stats: Path | None,
    others: dict[str, Any],
) -> None:
    """Start the run, or continue the one of the same inputs, ``others`` among them."""
    from dtq.allocate import parse_size
    from dtq.stages.run_identity import run_identity

    needs = frozenset[str]().union(*(run.recipe.needs() for run in runs))
    main = runs[0].tasks.workers.is_main
    inputs = run_identity(runs, needs, stats) if main else {}
    inputs |= {key: value for key, value in others.items() if value is not None and main}
    directory.begin(inputs, parse_size(memory) if memory else None)
    for run in runs:
        run.memory = directory.memory


def _print_finished(output: Path, as_json: bool) -> None:
    text = (output / "dtq_report.json").read_text(encoding="utf-8")
    click.echo(text if as_json else f"{output}: an earlier run has finished it")


def _plan(
    runs: list[Run],
    output: Path,
    vae: str | None,
    budget: PipelineBudget | None,
    text_encoder: str | None,
) -> None:
    """Plan every model; refuses before the work what cannot be done."""
    from dtq.recipe.resolve import BNB_NF4
    from dtq.stages.autoencoder import check_vae
    from dtq.stages.pipeline_sizes import check_budget, other_models, sizes
    from dtq.stages.plan import plan

    check_vae(runs[0].loaded.pipeline, vae or "keep")
    for run in runs:
        plan(run)
    if budget is not None:
        found = check_budget(runs, budget)
        _check_disk(min(budget.bytes, found.largest()), output)
    else:
        found = sizes(runs, other_models(runs, text_encoder == BNB_NF4), vae or "keep")
        _check_disk(found.largest(), output)


def _check_disk(needed: int, output: Path) -> None:
    """Refuse a disk that is too full before the work, not after it.

    Args:
        needed: bytes of all weight files that are written.
        output: folder to write.
    """
    from dtq.errors import InputError

    folder = output.resolve()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < 1.1 * needed:
        raise InputError(
            f"{parent}: {size(free)} free, the weight files of the output need {size(needed)}: "
            f"make room, or write to another disk with -o"
        )


def _save(
    directory: RunDirectory,
    runs: list[Run],
    reports: dict[str, Report],
    shard_size: str,
    vae: str | None,
    budget: PipelineBudget | None,
    text_encoder: str | None,
) -> dict[str, Any]:
    """Write the output folder; returns the report as plain data."""
    from dtq.checkpoint import writer
    from dtq.errors import InputError
    from dtq.io.safe_parse import finite_or_null
    from dtq.recipe.resolve import BNB_NF4
    from dtq.stages.autoencoder import quantize_autoencoder
    from dtq.stages.text_nf4 import quantize_text_encoders_nf4

    first = runs[0].loaded
    saveable = first.pipeline if first.pipeline is not None else first.model
    measured = finite_or_null({name: report.to_json() for name, report in reports.items()})
    data: dict[str, Any] = {**(measured if len(measured) > 1 else next(iter(measured.values())))}
    if text_encoder == BNB_NF4:
        data["bitsandbytes"] = quantize_text_encoders_nf4(first)
    chosen = vae or "keep" if budget is None else budget.outcome["vae"]
    if decodes := quantize_autoencoder(first.pipeline, chosen, runs[0].recipe.calibration):
        data["vae"] = finite_or_null(decodes)
    refused: list[str] = []
    with directory.result() as side:
        outcome = budget.outcome if budget is not None else {}
        written = writer.save_into(saveable, side, shard_size, measured, data.get("vae"), outcome)
        if first.pipeline is not None:
            data["pipeline"] = written
        if target := runs[0].target:
            data["exported"] = []
            for run in (each for each in runs if each.target):
                try:
                    data["exported"].append(_export(run, target, side))
                except InputError as error:
                    refused.append(str(error))
        text = json.dumps(data, indent=1) + "\n"
        (side / "dtq_report.json").write_text(text, encoding="utf-8")
    if refused:
        raise InputError(
            f"{directory.output} is complete, but has no file for {target}: {'; '.join(refused)}. "
            f"Try dtq export {directory.output} --to {target} --unsupported float"
        )
    return data


def _export(run: Run, target: str, folder: Path) -> str:
    """Write the file of the target into ``engines`` of the folder; returns its place there."""
    from dtq.engines import find_target
    from dtq.engines.export import export
    from dtq.engines.target import file_in_checkpoint

    file = file_in_checkpoint(run.loaded.component, find_target(target))
    (folder / file.parent).mkdir(exist_ok=True)
    export(run.model, target, folder / file)
    return str(file)
