# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command parses, calls one function, prints a table."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import psutil
import torch
import yaml
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError

import dtq
from dtq import checkpoint, source
from dtq.allocate import parse_size
from dtq.calibrate import sets, store
from dtq.calibrate.engine import run_pipeline
from dtq.calibrate.stats import STATS
from dtq.cli_gate import gate
from dtq.documents import finite, parse_yaml, read_json
from dtq.durable import write_folder, write_whole
from dtq.errors import DtqError, InputError, NumberError, first_line
from dtq.estimate import estimate
from dtq.job import inputs_of, job
from dtq.kernels import KERNELS, LIBRARIES, on
from dtq.plan import Plan
from dtq.printing import (
    inspected,
    or_dash,
    plan_json,
    print_bench,
    print_inspected,
    print_plan,
    print_race,
    print_result,
    size,
    table,
)
from dtq.quantize import calibrate_source, needs_of, plan_source, quantize_sources
from dtq.recipe import Calibration, Recipe, find, names
from dtq.team import Team

MODEL_HELP = "MODEL is a local diffusers folder, a hub id, or demo (the model bundled with dtq)."


class Commands(click.Group):
    """Turns what can go wrong into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        # a kill is an interrupt: half-written folders are removed on the way out
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(ctx)
        except DtqError as error:
            _fail(str(error))
        except SafetensorError as error:
            _fail(f"safetensors: {error}")
        except (MemoryError, RuntimeError, OSError) as error:
            if source.out_of_memory(error):
                _fail(
                    f"out of memory ({first_line(error)}). Take less at a time: --memory 4GB, "
                    f"--set calibration.batch=1; dtq plan says what is needed"
                )
            if not isinstance(error, OSError):
                raise
            _fail(" ".join(str(error).split()))
        except KeyboardInterrupt:
            click.echo("interrupted; no half-written folder is left", err=True)
            sys.exit(130)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    click.echo(f"error{f' in process {rank}' if rank != '0' else ''}: {message}", err=True)
    sys.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dtq.__version__)
@click.option("-v", "--verbose", is_flag=True, help="Say what is decided on the way.")
def main(verbose: bool) -> None:
    """Quantize diffusion transformers after training, and prove that they did not get worse.

    \b
    dtq quantize demo --recipe w4a8 -o demo-w4a8     quantize the bundled model
    dtq eval demo-w4a8 --reference demo -o report    compare it with the float one
    dtq gate report --baseline base.json             fail when it got worse since
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("dtq").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:  # diffusers' own deprecations are not the user's business
        warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
        diffusers_logging.set_verbosity_error()


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--recipe, --set and the calibration shortcuts."""
    for option in reversed(
        (
            click.option(
                "--recipe",
                default="w4a8",
                show_default=True,
                help="Name (dtq recipe ls) or YAML file.",
            ),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="KEY=VALUE",
                help="Override a recipe key: modulation=w4a16, calibration.steps=30.",
            ),
            click.option(
                "--calibration", help="Calibration set: shipped name, file, hub:OWNER/NAME."
            ),
            click.option(
                "--budget",
                metavar="BITS|SIZE",
                help="Mixed precision within this: 4.8 bits per weight, 12MB (ViDiT-Q-MP).",
            ),
            click.option("--samples", type=click.IntRange(1), help="Pictures to calibrate on."),
            click.option("--steps", type=click.IntRange(1), help="Sampler steps."),
            click.option("--guidance", type=float, help="Guidance scale."),
            click.option("--seed", type=click.IntRange(0), help="Seed of the calibration latents."),
        )
    ):
        command = option(command)
    return call_options(command)


def call_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a pipeline is called with: --arg and --images."""
    argument = click.option(
        "--arg",
        "arguments",
        multiple=True,
        metavar="NAME=VALUE",
        help="Argument of the pipeline's call: height=512, num_frames=17. Repeat for more.",
    )
    images = click.option(
        "--images",
        type=click.Path(),
        help="A picture or a folder of them, for pipelines that edit or continue pictures.",
    )
    return argument(images(command))


memory_option = click.option(
    "--memory",
    metavar="SIZE",
    help="What statistics may take, 8GB; the float model runs more often where it is little. "
    "Default: half of what is free.",
)
fresh_option = click.option(
    "--fresh", is_flag=True, help="Forget what an interrupted run finished."
)
component_option = click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME",
    help="Which model of the pipeline; repeat for more. Default: every diffusion transformer.",
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--component and --dtype."""
    for option in (
        click.option(
            "--dtype",
            type=click.Choice(["auto", *source.DTYPES]),
            default="auto",
            show_default=True,
            help="Of everything that is not quantized. auto: as on disk (fp32 for fp16 files without a GPU).",
        ),
        component_option,
    ):
        command = option(command)
    return command


@main.command()
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
    chosen = _recipe(choices)
    team = Team.join()
    statistics = store.load(stats) if stats else None
    started = time.monotonic()
    with (
        _quiet(as_json or not team.leads),
        job(output, team, fresh=fresh, overwrite=overwrite) as run,
    ):
        if run.finished:
            told = (output / "dtq_report.json").read_text(encoding="utf-8")
            click.echo(told if as_json else f"{output}: the run before had finished it")
            return
        opened = source.open_sources(model, dtype=dtype, component=components or "auto")
        for each in opened:
            _, plan = plan_source(each, chosen, keep)
            _check_disk(each.model, plan, each.dtype, output)
        inputs = inputs_of(opened, chosen, chosen.needs(), keep, stats) if team.leads else {}
        run.begin(inputs, parse_size(memory) if memory else None)
        reports = quantize_sources(
            opened,
            chosen,
            statistics=statistics,
            skip=keep,
            progress=team.leads and not as_json,
            work=run.work,
            memory=run.memory,
            last_look=sentinel,
        )
        if not team.leads:
            return
        first = opened[0]
        saveable = first.pipeline if first.pipeline is not None else first.model
        data: dict[str, Any] = {name: report.to_json() for name, report in reports.items()}
        if len(data) == 1:
            (data,) = data.values()
        data = finite(data)
        with run.result() as side:
            checkpoint.save_into(saveable, side, shard_size, data if len(reports) == 1 else None)
            text = json.dumps(data, indent=1) + "\n"
            (side / "dtq_report.json").write_text(text, encoding="utf-8")
    if as_json:
        click.echo(json.dumps(data))
        return
    for name, report in reports.items():
        if len(reports) > 1:
            click.echo(f"{name}:")
        print_result(report, output, time.monotonic() - started)


@main.command()
@click.argument("model")
@recipe_options
@component_option
@click.option(
    "--dtype", type=click.Choice(["auto", *source.DTYPES]), default="auto", show_default=True
)
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
    chosen = _recipe(choices)
    every: dict[str, dict[str, Any]] = {}
    found = source.skeletons(model, components or "auto")
    folder = Path(model)
    driven = not folder.exists() or source.folder_kind(folder) == "pipeline"
    for name, (skeleton, on_disk) in found.items():
        compute = on_disk if dtype == "auto" else source.DTYPES[dtype]
        opened = source.Source(model, None, name, skeleton)
        scan, resolved = plan_source(opened, chosen, keep)
        cost = estimate(
            skeleton,
            scan,
            resolved,
            chosen,
            compute,
            needs=needs_of(chosen, driven),
            memory=parse_size(memory) if memory else psutil.virtual_memory().available // 2,
            mapped=compute == on_disk,
        )
        if as_json:
            every[name] = plan_json(resolved, cost, scan)
            continue
        if len(found) > 1:
            click.echo(f"{name}:")
        print_plan(resolved, cost, scan, chosen)
    if as_json:
        click.echo(json.dumps(every if len(every) > 1 else next(iter(every.values()))))


@main.command()
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
    chosen = _recipe(choices)
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    team = Team.join()
    with _quiet(not team.leads), job(output, team, fresh=fresh, file=True) as run:
        every = source.open_sources(model, dtype=dtype, component=components or "auto")
        if len(every) > 1:
            found = ", ".join(each.component for each in every)
            raise InputError(
                f"{model} has several transformers: choose one of {found} by --component"
            )
        (opened,) = every
        scan, _ = plan_source(opened, chosen)
        # everything, whatever this recipe needs: the file then serves other recipes too
        needs = frozenset(STATS)
        run.begin(inputs_of(every, chosen, needs) if team.leads else {})
        statistics = calibrate_source(
            opened, scan, chosen, needs, progress=team.leads, memory=run.memory, work=run.work
        )
        if not team.leads:
            return
        store.save(statistics, output)
    click.echo(
        f"{output}: {len(statistics.sites)} inputs, {statistics.about['calls']} model calls, {size(output.stat().st_size)}"
    )


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@component_option
@click.option(
    "--kernels", is_flag=True, help="Show which kernel runs each layer, and why not another."
)
@click.option("--json", "as_json", is_flag=True)
def inspect(folder: Path, components: tuple[str, ...], kernels: bool, as_json: bool) -> None:
    """Check a quantized FOLDER and show what is in it.

    \b
    dtq inspect demo-w4a8 --kernels
    """
    found = checkpoint.verify(_existing(folder), components or "auto")
    every = {name: inspected(where) for name, where in found.items()}
    if as_json:
        click.echo(json.dumps(every if len(every) > 1 else next(iter(every.values()))))
        return
    for name, data in every.items():
        print_inspected(f"{folder}/{name}" if len(every) > 1 else str(folder), data, kernels)


@main.command()
@click.argument("model")
@click.option(
    "--prompt",
    "-p",
    "entries",
    multiple=True,
    help="Prompt, or class name or number. Repeat for more pictures.",
)
@click.option(
    "-n",
    "--count",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    help="Pictures when no prompt is given.",
)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1))
@click.option("--guidance", default=0.0, help="0: the pipeline's default.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--batch", default=8, show_default=True, type=click.IntRange(1), help="Generated together."
)
@click.option(
    "--dtype", type=click.Choice(["auto", *source.DTYPES]), default="auto", show_default=True
)
@call_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the pictures.",
)
def sample(
    model: str,
    entries: tuple[str, ...],
    count: int,
    steps: int,
    guidance: float,
    seed: int,
    batch: int,
    dtype: str,
    arguments: tuple[str, ...],
    images: str | None,
    output: Path,
) -> None:
    """Make pictures, videos or sounds with a float or quantized MODEL.

    A video is an animated PNG and a folder of its frames, a sound a WAV file.

    \b
    dtq sample demo-w4a8 -p face-smiling -p cat-face -o pictures
    dtq sample wan-w4a8 -p "a cat surfs" --arg num_frames=33 --batch 1 -o videos
    """
    from dtq.evaluate import pictures

    opened = _open(model, dtype)
    if opened.pipeline is None:
        raise InputError(f"{model} is a bare transformer; sampling needs the pipeline")
    how = Calibration(
        samples=len(entries) or count,
        steps=steps,
        guidance=guidance,
        batch=batch,
        seed=seed,
        arguments=_arguments(arguments),
        images=images or "",
    )
    requests = (
        sets.given(list(entries), opened.pipeline)
        if entries
        else sets.load("auto", opened.pipeline, count)
    )
    every: list[torch.Tensor] = []
    with torch.no_grad():
        for result in run_pipeline(opened.pipeline, requests, how):
            every += pictures.shown(result)
    if not all(made.isfinite().all() for made in every):
        raise NumberError(
            f"{model}: the pictures hold numbers that are not finite. DTQ_DEBUG_NAN=1 dtq sample "
            f"... names the first layer and step; --dtype bf16 has more range than fp16"
        )
    write_folder(output)
    for i, made in enumerate(every):
        suffix, data = pictures.encoded(made, pictures.rate(opened.pipeline))
        write_whole(output / f"{i:04d}{suffix}", data)
        if made.ndim == 4:  # the frames too: what other tools read
            write_folder(output / f"{i:04d}")
            for k, frame in enumerate(made):
                write_whole(output / f"{i:04d}" / f"{k:04d}.png", pictures.file(frame))
    first = every[0]
    what = {2: "sounds", 3: "pictures", 4: f"videos of {len(first)} frames"}[first.ndim]
    if first.ndim > 2 and all(made.shape == first.shape for made in every):
        what += " and sheet.png"
        rows = [torch.stack(every[i : i + 8]) for i in range(0, len(every), 8)]
        if first.ndim == 4:  # a row of frames each
            rows = [pictures.strip(video) for video in every]
        page = pictures.sheet(rows, scale=2 if first.shape[-1] <= 128 else 1)
        write_whole(output / "sheet.png", pictures.png(page))
    click.echo(f"{output}: {len(every)} {what}")


@main.command("eval")
@click.argument("candidate")
@click.option("--reference", required=True, help="The float model.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for report.html and eval.json."
)
@click.option(
    "--samples", default=16, show_default=True, type=click.IntRange(1), help="Same-seed pictures."
)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1))
@click.option("--guidance", default=0.0, help="0: the pipeline's default.")
@click.option("--seed", default=1000, show_default=True, help="Not the calibration's.")
@click.option(
    "--set",
    "requests",
    default="auto",
    show_default=True,
    help="What to ask for, as in calibration.",
)
@click.option(
    "--batch", default=8, show_default=True, type=click.IntRange(1), help="Generated together."
)
@click.option(
    "--pictures", "keep_pictures", is_flag=True, help="Keep every picture, for the gate's sheet."
)
@click.option(
    "--fid",
    default=0,
    show_default=True,
    help="Pictures of each model for figures of whole sets; fid when no --metric names one.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="More figures, commas between: fid sfid kid is precision recall fd-dinov2 cmmd (with "
    "--fid), ms-ssim lpips clip-score clip-iqa image-reward. One that cannot run: exit code 3.",
)
@click.option(
    "--features",
    default="auto",
    show_default=True,
    help="Extractor of fid, kid, ...: emoji, inception, dinov2, clip, random; auto: emoji for the "
    "bundled models, else inception.",
)
@click.option(
    "--extractor",
    "weights",
    multiple=True,
    metavar="NAME=WHERE",
    help="Local path or hub id of an extractor's or a metric's weights.",
)
@click.option(
    "--reference-set",
    type=click.Path(path_type=Path),
    help="ADM npz, pictures or moments, to compare with too.",
)
@click.option("--npz", is_flag=True, help="Keep those pictures for the ADM suite: candidate.npz.")
@click.option(
    "--against",
    "--baseline",
    "baseline",
    multiple=True,
    help="Rows of other libraries on the same layers, commas between: torchao-int4, torchao-w4a8, "
    "torchao-w8a8, quanto-int4, bnb-nf4.",
)
@click.option(
    "--dtype", type=click.Choice(["auto", *source.DTYPES]), default="auto", show_default=True
)
@call_options
@click.option("--json", "as_json", is_flag=True)
def evaluate_(
    candidate: str,
    reference: str,
    output: Path | None,
    samples: int,
    steps: int,
    guidance: float,
    seed: int,
    requests: str,
    fid: int,
    metrics: tuple[str, ...],
    features: str,
    weights: tuple[str, ...],
    reference_set: Path | None,
    npz: bool,
    batch: int,
    keep_pictures: bool,
    baseline: tuple[str, ...],
    dtype: str,
    arguments: tuple[str, ...],
    images: str | None,
    as_json: bool,
) -> None:
    """Compare a quantized CANDIDATE with its float model, same seeds.

    \b
    dtq eval demo-w4a8 --reference demo -o report
    dtq eval demo-w4a8 --reference demo --fid 256 --metric fid,kid,precision,recall
    """
    from dtq.evaluate import adm, figures, report, run, runfile

    say: Callable[[str], None] = (
        (lambda line: None) if as_json else (lambda line: click.echo(f"  {line}"))
    )
    asked = figures.Asked(
        tuple(_listed(metrics)) or (("fid",) if fid else ()), fid, features,
        _pairs(weights, "--extractor"), reference_set,
    )  # fmt: skip
    asked.check()
    if output is not None:  # a gate must never read an older run than the one that failed
        (output / "eval.json").unlink(missing_ok=True)
    if npz and (output is None or not asked.distributions):
        raise InputError("--npz needs a folder and pictures to keep: -o FOLDER --fid 5000")
    opened, float_model = _open(candidate, dtype), _open(reference, dtype)
    how = Calibration(
        set=requests,
        samples=samples,
        steps=steps,
        guidance=guidance,
        batch=batch,
        seed=seed,
        arguments=_arguments(arguments),
        images=images or "",
    )
    result = run.evaluate(
        opened, float_model, how, baselines=_listed(baseline), asked=asked, say=say
    )
    result.quantization = run.quantization_report(opened.path)
    result.command = f"dtq {shlex.join(sys.argv[1:])}"
    if output is not None:
        write_folder(output)
        for side, crowd in result.crowds.items():
            crowd.save(output / f"features-{side}.safetensors")
            if npz:
                adm.write(crowd.pictures, output / f"{side}.npz")
        write_whole(output / "eval.json", runfile.text(result.to_json()))
        write_whole(output / "report.html", report.render(result))
        if keep_pictures:
            run.write_pictures(result, output)
    if as_json:
        click.echo(json.dumps(runfile.finite(result.to_json())))
        sys.exit(3 if result.run is not None and result.run.missing else 0)
    table(
        ("model", "per-step error", "worst step", "bits", "PSNR", "SSIM", "FID to float"),
        [
            (
                r.name,
                f"{r.error:.2e}",
                f"{max(r.error_steps):.2e}",
                or_dash(r.bits, ".2f"),
                or_dash(r.psnr, ".1f"),
                or_dash(r.ssim, ".4f"),
                or_dash(r.fid_float, ".2f"),
            )
            for r in result.rows
        ],
    )
    if result.figures:
        table(report.FIGURES, [report.figure_cells(each) for each in result.figures])
        click.echo(report.figure_conditions(result))
    click.echo(report.verdict(result)[1])
    if output is not None:
        click.echo(f"report: {output / 'report.html'}")
    if result.run is not None and result.run.missing:
        for name, why in result.run.missing.items():
            click.echo(f"error: {name} was asked for and is missing: {why}", err=True)
        sys.exit(3)


main.add_command(gate)


@main.group()
def recipe() -> None:
    """List, show, check and copy recipes."""


@recipe.command("ls")
def recipe_ls() -> None:
    """Names and one line each."""
    table(("recipe", "about"), [(name, Recipe.load(name).about) for name in names()])


@recipe.command("show")
@click.argument("name")
def recipe_show(name: str) -> None:
    """A recipe with every default filled in."""
    click.echo(
        yaml.safe_dump(Recipe.load(name).to_dict(), sort_keys=False, allow_unicode=True).rstrip()
    )


@recipe.command("check")
@click.argument("files", nargs=-1, required=True)
def recipe_check(files: Sequence[str]) -> None:
    """Report every mistake in recipe FILES."""
    broken = 0
    for file in files:
        try:
            Recipe.load(file)
            click.echo(f"{file}: good")
        except DtqError as error:
            broken += 1
            click.echo(str(error), err=True)
    if broken:
        sys.exit(1)


@recipe.command("cp")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path))
def recipe_cp(name: str, target: Path) -> None:
    """Copy a recipe to TARGET to edit it."""
    if target.exists():
        raise InputError(f"{target} exists; choose another name")
    if target.suffix not in (".yaml", ".yml"):
        raise InputError(f"{target}: a recipe file ends in .yaml")
    shutil.copyfile(find(name), target)
    click.echo(f"{target}: edit it, then dtq recipe check {target}")


@main.command("bench")
@click.option("--suite", type=click.Choice(["gemm", "e2e"]), default="gemm", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="The GPU where there is one.")
@click.option(
    "--quick", is_flag=True, help="Fewer sizes; blocks of the large model, not all of it."
)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(2))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="FILE for every figure.")
def bench_(
    suite: str, device: str | None, quick: bool, rounds: int, threads: int, json_file: Path | None
) -> None:
    """Time quantized layers beside float ones on this machine.

    gemm: single linears. e2e: one denoising step of models with random weights.

    \b
    dtq bench --quick
    dtq bench --suite e2e --device cuda
    """
    from dtq import bench, bench_gpu
    from dtq.kernels import LIBRARIES

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        bench_gpu.gpu()
    LIBRARIES[device].load()
    suites = bench_gpu.SUITES if device == "cuda" else bench.SUITES
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = suites[suite](quick=quick, rounds=rounds, say=print_race)
    finally:
        torch.set_num_threads(before)
    if json_file is not None:
        write_whole(json_file, json.dumps(result.to_json(), indent=1) + "\n")
    print_bench(result)


@main.command()
def doctor() -> None:
    """Say what this machine has, what runs on it, and what is missing."""
    import importlib.util
    import platform

    from dtq import demo

    rows = [
        ("python", platform.python_version()),
        ("dtq", dtq.__version__),
        ("torch", torch.__version__),
    ]
    for package in (
        "diffusers",
        "safetensors",
        "accelerate",
        "peft",
        "datasets",
        "torchmetrics",
        "matplotlib",
        "torchao",
        "optimum.quanto",
    ):
        rows.append(
            (package, _version(package) if _found(importlib.util, package) else "not installed")
        )
    if torch.cuda.is_available():
        rows.append(
            (
                "gpu",
                f"{torch.cuda.get_device_name()}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}",
            )
        )
    else:
        rows.append(("gpu", "none that torch can use; everything runs on the CPU"))
    rows.append(
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    )
    rows.append(("kernels", ", ".join(k.name for k in KERNELS)))
    for kernel in KERNELS:
        rows.append((f"  {kernel.name}", "; ".join(on(kernel, x) for x in LIBRARIES.values())))
    for library in LIBRARIES.values():
        rows.append((f"{library.title} kernels", library.describe()))
        rows += [(f"  {name}", what) for name, what in library.rungs()]
    rows.append(
        (
            "bundled model",
            size(sum(f.stat().st_size for f in demo.folder().rglob("*") if f.is_file())),
        )
    )
    table(("what", "here"), rows)


def _found(util: Any, package: str) -> bool:
    try:
        return util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package.replace(".", "-"))
    except PackageNotFoundError:
        return "present"


def _recipe(choices: dict[str, Any]) -> Recipe:
    """The recipe with --set and the shortcuts applied."""
    chosen = Recipe.load(choices["recipe"])
    data = chosen.to_dict()
    data.pop("name")
    settings = list(choices["settings"])
    for option, key in (
        ("calibration", "set"),
        ("samples", "samples"),
        ("steps", "steps"),
        ("guidance", "guidance"),
        ("seed", "seed"),
        ("images", "images"),
    ):
        if choices[option] is not None:
            data["calibration"][key] = choices[option]
    data["calibration"]["arguments"] |= _arguments(choices["arguments"])
    if choices["budget"] is not None:
        data["allocate"]["budget"] = choices["budget"]
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected KEY=VALUE")
        value = parse_yaml(text, f"--set {setting}") if text else ""
        _put(data, key.split("."), value, setting)
    return Recipe.load(chosen, **data)


def _put(data: dict[str, Any], path: list[str], value: Any, setting: str) -> None:
    for step in path[:-1]:
        below: Any = data.get(step)
        if isinstance(below, str):  # a method without knobs: solver.gptq.damp
            below = {below: {}}
        if not isinstance(below, dict):
            raise InputError(f"--set {setting}: {step!r} has no keys")
        if below is not data.get(step):
            data[step] = below
        data = below
    data[path[-1]] = value


def _arguments(options: Sequence[str]) -> dict[str, Any]:
    """Arguments of the pipeline's call; values as YAML reads them."""
    pairs = _pairs(options, "--arg")
    return {name: parse_yaml(text, f"--arg {name}={text}") for name, text in pairs.items()}


def _listed(options: Sequence[str]) -> list[str]:
    """Words of an option that takes commas and may be repeated."""
    return [word.strip() for option in options for word in option.split(",") if word.strip()]


def _pairs(options: Sequence[str], option: str) -> dict[str, str]:
    found = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{option} {text}: expected NAME=VALUE")
        found[name] = value
    return found


def _open(model: str, dtype: str) -> source.Source:
    """Open a model; a dtq checkpoint is verified first, so that damage is one clear line."""
    path = Path(model)
    if path.is_dir() and source.folder_kind(path) == "pipeline":
        config = path / "transformer" / "config.json"
        if config.is_file() and "quantization_config" in read_json(config):
            checkpoint.verify(path)
    return source.open_source(model, dtype=dtype)


def _existing(folder: Path) -> Path:
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    return folder


def _check_disk(model: torch.nn.Module, plan: Plan, dtype: torch.dtype, output: Path) -> None:
    """Say early that the disk is too full, not after the work."""
    from dtq.estimate import file_tensors

    parent = output.resolve()
    while not parent.exists():
        parent = parent.parent
    needed = checkpoint.predicted_bytes(file_tensors(model, plan, dtype))
    free = shutil.disk_usage(parent).free
    if free < 1.1 * needed:
        raise InputError(f"{parent}: {size(free)} free, the checkpoint needs {size(needed)}")


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    if quiet:
        diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            diffusers_logging.enable_progress_bar()


if __name__ == "__main__":
    main()
