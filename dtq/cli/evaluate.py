# SPDX-License-Identifier: Apache-2.0
"""``dtq sample`` and ``dtq eval``: what a model makes, alone and beside its float one."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from dtq.checkpoint import reader
from dtq.cli.options import calibration_of, listed, pairs, quiet, sampling_options
from dtq.cli.output import or_dash, table
from dtq.errors import InputError, NonFiniteError
from dtq.io.atomic import atomic_write, make_directory
from dtq.io.safe_parse import finite_or_null, read_json
from dtq.pipelines import loading, prompts
from dtq.pipelines.sampling import run_pipeline
from dtq.runs.workers import Workers

_ON_SHEET = 64
"""Pictures of one sheet at most."""


@click.command()
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
@sampling_options(seed=0)
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
    dtype: str,
    output: Path,
    **job: Any,
) -> None:
    """Make pictures, videos or sounds with a float or quantized MODEL.

    A video is an animated PNG and a folder of its frames, a sound a WAV file. Under torchrun the
    processes share the pictures.

    \b
    dtq sample demo-w4a8 -p face-smiling -p cat-face -o pictures
    dtq sample wan-w4a8 -p "a cat surfs" --arg num_frames=33 --batch 1 -o videos
    """
    from dtq.evaluate.metrics import images
    from dtq.runs import gather

    team = _team(output)
    opened = _open(model, dtype)
    if opened.pipeline is None:
        raise InputError(f"{model} is a bare transformer; sampling needs the pipeline")
    how = calibration_of(samples=len(entries) or count, **job)
    requests = (
        prompts.given(list(entries), opened.pipeline)
        if entries
        else prompts.load("auto", opened.pipeline, count)
    )
    places = team.shard(len(requests.entries), how.batch_size)
    left = iter(places)
    shown: dict[int, torch.Tensor] = {}  # on the sheet
    with torch.no_grad():
        for result in run_pipeline(opened.pipeline, requests, how, only=places):
            for made in images.shown(result):
                if not made.isfinite().all():
                    raise NonFiniteError(
                        f"{model}: the pictures hold numbers that are not finite. DTQ_DEBUG_NAN=1 "
                        f"dtq sample ... names the first layer and step; --dtype bf16 has more "
                        f"range than fp16"
                    )
                place = next(left)
                _write(made, output / f"{place:04d}", images.rate(opened.pipeline))
                if place < _ON_SHEET:
                    shown[place] = made
    tensors = {f"{place:04d}": made for place, made in shown.items()}
    found = gather.gather(team, output / ".shares", "sheet", tensors, places)
    if found is None:
        return
    shutil.rmtree(output / ".shares", ignore_errors=True)
    count = len(requests.entries)
    gather.check_ids([f"{place:04d}" for _, made_by in found for place in made_by], count)
    together = {name: made for part, _ in found for name, made in part.items()}
    every = [together[name] for name in sorted(together)]
    first = every[0]
    what = {2: "sounds", 3: "pictures", 4: f"videos of {len(first)} frames"}[first.ndim]
    if first.ndim > 2 and all(made.shape == first.shape for made in every):
        what += " and sheet.png" if len(every) == count else f", {len(every)} of them on sheet.png"
        rows = [torch.stack(every[i : i + 8]) for i in range(0, len(every), 8)]
        if first.ndim == 4:  # a row of frames each
            rows = [images.strip(video) for video in every]
        page = images.sheet(rows, scale=2 if first.shape[-1] <= 128 else 1)
        atomic_write(output / "sheet.png", images.png(page))
    click.echo(f"{output}: {count} {what}")


def _write(made: torch.Tensor, path: Path, rate: int) -> None:
    """A picture, a sound, or a video, which also gets a folder of frames: what other tools read."""
    from dtq.evaluate.metrics import images

    suffix, data = images.encoded(made, rate)
    make_directory(path.parent)
    atomic_write(path.with_suffix(suffix), data)
    if made.ndim == 4:
        make_directory(path)
        for k, frame in enumerate(made):
            atomic_write(path / f"{k:04d}.png", images.file(frame))


@click.command("eval")
@click.argument("candidate")
@click.option("--reference", required=True, help="The float model.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for report.html and eval.json."
)
@click.option(
    "--samples", default=16, show_default=True, type=click.IntRange(1), help="Same-seed pictures."
)
@sampling_options(seed=1000, about="Not the calibration's.")
@click.option(
    "--set",
    "requests",
    default="auto",
    show_default=True,
    help="What to ask for, as in calibration.",
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
@click.option("--json", "as_json", is_flag=True)
def evaluate(
    candidate: str,
    reference: str,
    output: Path | None,
    requests: str,
    fid: int,
    metrics: tuple[str, ...],
    features: str,
    weights: tuple[str, ...],
    reference_set: Path | None,
    npz: bool,
    keep_pictures: bool,
    baseline: tuple[str, ...],
    dtype: str,
    as_json: bool,
    **job: Any,
) -> None:
    """Compare a quantized CANDIDATE with its float model, same seeds.

    Under torchrun the processes share the pictures; the figures are those of one process.

    \b
    dtq eval demo-w4a8 --reference demo -o report
    dtq eval demo-w4a8 --reference demo --fid 256 --metric fid,kid,precision,recall
    """
    from dtq.evaluate import evaluate, requested_metrics, run_file
    from dtq.evaluate.metrics import adm_suite
    from dtq.evaluate.report import html
    from dtq.evaluate.report.quantization_report import quantization_report

    team = _team(output)
    quiet = as_json or not team.is_main
    say: Callable[[str], None] = (
        (lambda line: None) if quiet else (lambda line: click.echo(f"  {line}"))
    )
    asked = requested_metrics.MetricRequest(
        tuple(listed(metrics)) or (("fid",) if fid else ()), fid, features,
        pairs(weights, "--extractor"), reference_set,
    )  # fmt: skip
    asked.check()
    # a gate must never read an older run than the one that failed
    if output is not None and team.is_main:
        (output / "eval.json").unlink(missing_ok=True)
    if npz and (output is None or not asked.distributions):
        raise InputError("--npz needs a folder and pictures to keep: -o FOLDER --fid 5000")
    opened, float_model = _open(candidate, dtype), _open(reference, dtype)
    quantization = quantization_report(opened.path)
    how = calibration_of(prompts=requests, **job)
    result = evaluate.evaluate(
        opened, float_model, how, baselines=listed(baseline), request=asked, progress=say,
        workers=team, folder=None if output is None else output / ".shares",
    )  # fmt: skip
    if result is None:  # the first process says and writes it
        return
    result.quantization = quantization
    result.command = f"dtq {shlex.join(sys.argv[1:])}"
    if output is not None:
        make_directory(output)
        shutil.rmtree(output / ".shares", ignore_errors=True)
        for side, crowd in result.image_sets.items():
            crowd.save(output / f"features-{side}.safetensors")
            if npz:
                adm_suite.write(crowd.images, output / f"{side}.npz")
        atomic_write(output / "eval.json", run_file.text(result.to_json()))
        atomic_write(output / "report.html", html.render(result))
        if keep_pictures:
            evaluate.write_images(result, output)
    if as_json:
        click.echo(json.dumps(finite_or_null(result.to_json())))
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
    if result.metrics:
        table(html.FIGURES, [html.figure_cells(each) for each in result.metrics])
        click.echo(html.figure_conditions(result))
    click.echo(html.verdict(result)[1])
    if output is not None:
        click.echo(f"report: {output / 'report.html'}")
    if result.run is not None and result.run.missing:
        for name, why in result.run.missing.items():
            click.echo(f"error: {name} was asked for and is missing: {why}", err=True)
        sys.exit(3)


def _team(output: Path | None) -> Workers:
    """The processes that share the pictures.

    Raises:
        InputError: several, and no folder that all of them see.
    """
    team = Workers.join()
    if team.size > 1 and output is None:
        raise InputError("several processes share a folder that all of them see; give it: -o")
    click.get_current_context().with_resource(quiet(not team.is_main))
    return team


def _open(model: str, dtype: str) -> loading.LoadedModel:
    """Open a model; a dtq checkpoint is verified first, so that damage is one clear line."""
    path = Path(model)
    if path.is_dir() and loading.folder_kind(path) == "pipeline":
        configs = [
            path / name / "config.json" for name in loading.diffusion_transformers_on_disk(path)
        ]
        if any(c.is_file() and "quantization_config" in read_json(c) for c in configs):
            reader.verify(path)
    return loading.load_transformer(model, dtype=dtype)
