# SPDX-License-Identifier: Apache-2.0
"""``dtq eval``: a quantized model compared with its float model."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtq.cli import options as opt
from dtq.cli.output import COMPONENT_COLUMNS, INVALID, component_cells, or_dash, table
from dtq.errors import InputError

if TYPE_CHECKING:
    from dtq.evaluate.evaluate import Evaluation
    from dtq.evaluate.requested_metrics import MetricRequest
    from dtq.evaluate.vbench_metrics import VBenchRequest


log = logging.getLogger("dtq")

# fmt: off
_options = opt.combined(
    click.option("--reference", required=True, help="The float model: a folder or a name."),
    click.option("--candidate-engine", "engine", default="dtq", metavar="NAME",
                 help="What runs CANDIDATE: dtq, or another project's package, which runs the exported file: "
                      "comfy-kitchen, gguf, torchao, onnx or openvino. The engine's version and the file's "
                      "SHA-256 are in eval.json."),
    opt.output(help="Folder for report.html and eval.json. Default: not written."),
    opt.count("--samples", default=16, help="Number of images that both models sample from the same seeds."),
    opt.sampling(1000, "Seed of the latents; keep it different from the calibration seed."),
    opt.flag("--components", help="Also measure what each quantized component adds to the error: it "
                                  "alone is quantized, the others are float. One more sampling run each."),
    opt.flag("--keep-images", "keep_images", help="Keep every image of both models, for dtq gate --sheet."),
    click.option("--num-images", default=0,
                 help="Number of images per model for distribution metrics, which are fid unless "
                      "--metric names others. 0 computes none."),
    opt.several("--metric", "metrics", metavar="NAME[,NAME]",
            help="More metrics: fid sfid kid is precision recall fd-dinov2 cmmd fvd (with --num-images), "
                 "ms-ssim lpips perceptual-lite0 clip-score clip-iqa image-reward. One that cannot be computed makes "
                 "the exit code 3. Default: none."),
    click.option("--features", default="auto", metavar="NAME",
                 help="Feature extractor of fid, sfid, kid, is, precision and recall: emoji, "
                      "efficientnet-lite0, inception, dinov2, clip, i3d (videos) or random. auto is emoji for the bundled models, else "
                      "inception."),
    opt.several("--extractor", "weights", metavar="NAME=WHERE",
            help="Local path or hub id of the weights of an extractor or a metric. Repeat for more. "
                 "Default: none."),
    opt.path("--reference-set",
         help="ADM .npz (images or statistics) or a folder of images or videos, as an additional "
              "reference. Default: none."),
    click.option("--set-prompts", default="auto", metavar="NAME",
                 help="Prompt set of --num-images: a shipped name, a file, or hub:OWNER/NAME. auto is "
                      "every label, or the set that fits the model."),
    opt.flag("--npz", help="Keep the images of --num-images for the ADM suite: candidate.npz."),
    opt.several("--vbench", "dimensions", metavar="NAME[,NAME]",
            help="Dimensions of VBench for the videos of both models: temporal_flickering, "
                 "subject_consistency, ... Needs -o and dtq[video]. Default: none."),
    opt.path("--vbench-python",
         help="Python of the environment with the package vbench (make vbench-env). Default: none."),
    opt.path("--vbench-cache",
         help="Folder of the weights of vbench; nothing is downloaded. Default: none."),
    opt.path("--vbench-results",
         help="Result file of vbench that was made elsewhere for videos/candidate. Default: none."),
    opt.count("--vbench-timeout", default=3600,
          help="Seconds that vbench may take for the videos of one model."),
    opt.flag("--mp4", help="Write the videos of both models: videos/candidate/0000.mp4. Needs "
                           "dtq[video]."),
    opt.several("--compare-with", "libraries", metavar="LIB[,LIB]",
            help="Rows of other libraries on the same layers: torchao-int4, torchao-w4a8, "
                 "torchao-w8a8, quanto-int4, bnb-nf4. Default: none."),
    opt.json(help="Print the result as JSON, without a table."),
)
# fmt: on


@click.command("eval")
@click.argument("candidate")
@_options
def evaluate(
    candidate: str,
    reference: str,
    engine: str,
    output: Path | None,
    npz: bool,
    keep_images: bool,
    components: bool,
    libraries: tuple[str, ...],
    dtype: str,
    variant: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compare a quantized CANDIDATE with its float model.

    Both sample with the same seeds. CANDIDATE is the output of dtq quantize, or a file that dtq
    export wrote: it takes the place of the transformer in the pipeline of the float model.
    --candidate-engine has the file run by the software that it is for, so that dtq eval measures,
    and dtq gate compares, what users will run. Under torchrun the processes share the images; the
    metrics are those of a single process.

    \b
    dtq eval demo-w4a8 --reference demo -o report
    dtq eval demo-w4a8 --reference demo --num-images 256 --metric fid,kid,precision,recall
    dtq eval demo-int8.safetensors --reference demo --candidate-engine comfy-kitchen -o report
    """
    from dtq.cli.inputs import join_workers, listed, load_candidate, sampling_settings
    from dtq.evaluate.evaluate import evaluate
    from dtq.evaluate.report.quantization_report import quantization_report

    workers = join_workers(output)
    request, vbench = _metric_request(settings), _vbench_request(settings)
    request.check()
    vbench.check()
    # a gate must never read an older run than the one that failed
    if output is not None and workers.is_main:
        (output / "eval.json").unlink(missing_ok=True)
    if npz and (output is None or not request.distributions):
        raise InputError("--npz needs a folder and images to keep: -o FOLDER --num-images 5000")
    loaded, float_model = load_candidate(candidate, engine, reference, dtype, variant)
    quantization = quantization_report(loaded.path)
    shown = workers.is_main and not as_json
    result = evaluate(
        loaded,
        float_model,
        sampling_settings(**settings),
        baselines=listed(libraries),
        request=request,
        progress=lambda line: click.echo(f"  {line}") if shown else None,
        vbench=vbench,
        videos_to=output,
        components=components,
        workers=workers,
        folder=None if output is None else output / ".shares",
    )
    if result is None:  # the main process prints and writes it
        return
    result.quantization = quantization
    result.command = f"dtq {shlex.join(sys.argv[1:])}"
    if output is not None:
        _save(result, output, npz, keep_images)
    if as_json:
        from dtq.io.safe_parse import finite_or_null

        click.echo(json.dumps(finite_or_null(result.to_json())))
    else:
        _print(result, output)
    if result.run.missing:
        sys.exit(INVALID)


def _metric_request(settings: dict[str, Any]) -> MetricRequest:
    """Metrics beyond those of every run; their options are taken out of ``settings``."""
    from dtq.cli.inputs import listed, pairs
    from dtq.evaluate.requested_metrics import MetricRequest

    count = settings.pop("num_images")
    return MetricRequest(
        tuple(listed(settings.pop("metrics"))) or (("fid",) if count else ()),
        count,
        settings.pop("features"),
        dict(pairs(settings.pop("weights"), "--extractor")),
        settings.pop("reference_set"),
        settings.pop("set_prompts"),
    )


def _vbench_request(settings: dict[str, Any]) -> VBenchRequest:
    """What VBench scores; its options are taken out of ``settings``."""
    from dtq.cli.inputs import listed
    from dtq.evaluate.vbench_metrics import VBenchRequest

    keys = ("python", "cache", "results", "timeout")
    options = {key: settings.pop(f"vbench_{key}") for key in keys}
    dimensions = tuple(listed(settings.pop("dimensions")))
    return VBenchRequest(dimensions, mp4=settings.pop("mp4"), **options)


def _save(result: Evaluation, output: Path, npz: bool, keep_images: bool) -> None:
    """Write the report, the run file and, if asked for, the images."""
    from dtq.evaluate import feature_file, run_file
    from dtq.evaluate.evaluate import write_images
    from dtq.evaluate.metrics import adm_suite
    from dtq.evaluate.report import html
    from dtq.io.atomic import atomic_write, make_directory

    make_directory(output)
    shutil.rmtree(output / ".shares", ignore_errors=True)
    run = result.run
    if run.image_sets is not None:
        run.image_sets = feature_file.write(run.features, output, run.image_sets)
    for model, images in result.image_sets.items():
        if npz and images.frames > 1:
            log.warning("--npz: the file holds images, so it is not written for videos")
        elif npz:
            adm_suite.write(images.images, output / f"{model}.npz")
    atomic_write(output / "eval.json", run_file.text(result.to_json()))
    atomic_write(output / "report.html", html.render(result))
    if keep_images:
        write_images(result, output)


def _print(result: Evaluation, output: Path | None) -> None:
    from dtq.evaluate.report import html

    head = ("model", "per-step error", "worst step", "bits", "PSNR", "SSIM", "FID to float")
    rows = [
        (
            row.name,
            f"{row.error:.2e}",
            f"{max(row.error_steps):.2e}",
            or_dash(row.bits, ".2f"),
            or_dash(row.psnr, ".1f"),
            or_dash(row.ssim, ".4f"),
            or_dash(row.fid_float, ".2f"),
        )
        for row in result.rows
    ]
    table(head, rows)
    if result.text_encoders:
        errors = [(name, f"{error:.2e}") for name, error in result.text_encoders.items()]
        table(("text encoder", "error of the embeddings"), errors)
    if parts := result.run.components:
        table(COMPONENT_COLUMNS, [component_cells(part) for part in parts])
    if result.metrics:
        table(html.METRIC_COLUMNS, [html.metric_cells(value) for value in result.metrics])
        click.echo(html.metric_conditions(result))
    click.echo(html.verdict(result)[1])
    if output is not None:
        click.echo(f"report: {output / 'report.html'}")
    for name, why in result.run.missing.items():
        click.echo(f"error: {name} was asked for and is missing: {why}", err=True)
