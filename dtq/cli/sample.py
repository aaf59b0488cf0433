# SPDX-License-Identifier: Apache-2.0
"""``dtq sample``: images, videos or sounds of a float or quantized model."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtq.cli import options as opt
from dtq.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor

    from dtq.pipelines.loading import LoadedModel

_ON_SHEET = 64
"""Images on the contact sheet, at most."""


# fmt: off
_options = opt.combined(
    opt.several("--prompt", "-p", "entries",
            help="Prompt, or name or number of a class. Repeat for more images. Default: --prompts."),
    opt.count("-n", "--count", "how_many", default=8,
          help="Number of images when no --prompt is given; the prompts come from --prompts."),
    opt.sampling(0, "Seed of the latents."),
    opt.flag("--mp4", help="Also write videos as MP4, which needs dtq[video]."),
    opt.count("--fps", default=8, help="Frames per second of --mp4."),
    opt.output(required=True, help="Folder for the images."),
)
# fmt: on


@click.command()
@click.argument("model")
@_options
def sample(
    model: str,
    entries: tuple[str, ...],
    how_many: int,
    dtype: str,
    variant: str | None,
    mp4: bool,
    fps: int,
    output: Path,
    **options: Any,
) -> None:
    """Generate images, videos or sounds with MODEL.

    MODEL is float or quantized: a local diffusers folder, a hub id, or a bundled model: demo, demo-outliers,
    demo-video, demo-text, demo-text-4step. A video is an animated PNG and a folder of its frames, a
    sound is a WAV file. Under torchrun the processes share the images.

    \b
    dtq sample demo-w4a8 -p face-smiling -p cat-face -o images
    dtq sample wan-w4a8 -p "a cat surfs" --arg num_frames=33 --batch 1 -o videos
    """
    from dtq.cli.inputs import join_workers, load_verified, sampling_settings
    from dtq.evaluate import optional_packages
    from dtq.pipelines import prompts
    from dtq.pipelines.sampling import run_pipeline
    from dtq.runs import gather

    if mp4:
        optional_packages.need("imageio_ffmpeg", "dtq[video]")
    workers = join_workers(output)
    loaded = load_verified(model, dtype, variant)
    if loaded.pipeline is None:
        raise InputError(f"{model} is a bare transformer; sampling needs the pipeline")
    how_many = len(entries) or how_many
    settings = sampling_settings(samples=how_many, **options)
    if entries:
        requests = prompts.given(list(entries), loaded.pipeline)
    else:
        requests = prompts.load(settings.prompts, loaded.pipeline, how_many)
    places = workers.shard(how_many, settings.batch_size)
    results = run_pipeline(loaded.pipeline, requests, settings, only=places)
    on_sheet = _generate(loaded, results, places, output, fps if mp4 else 0)
    shards = gather.gather(workers, output / ".shares", "sheet", on_sheet, places)
    if shards is None:
        return
    shutil.rmtree(output / ".shares", ignore_errors=True)
    gather.check_ids([f"{place:04d}" for _, shard in shards for place in shard], how_many)
    together = {name: sample for tensors, _ in shards for name, sample in tensors.items()}
    kind = _write_sheet([together[name] for name in sorted(together)], how_many, output)
    click.echo(f"{output}: {how_many} {kind}")


def _generate(
    loaded: LoadedModel, results: Iterable[Any], places: Sequence[int], output: Path, fps: int
) -> dict[str, Tensor]:
    """Write the samples of this process; returns those on the contact sheet."""
    import torch

    from dtq.evaluate.metrics import images

    left = iter(places)
    on_sheet: dict[str, Tensor] = {}
    with torch.no_grad():
        for result in results:
            for sample in images.shown(result):
                if not sample.isfinite().all():
                    raise NonFiniteError(
                        f"{loaded.name}: the images hold numbers that are not finite. "
                        f"DTQ_DEBUG_NAN=1 dtq sample ... names the first layer and step; --dtype "
                        f"bf16 has more range than fp16"
                    )
                place = next(left)
                _write(sample, output / f"{place:04d}", images.rate(loaded.pipeline), fps)
                if place < _ON_SHEET:
                    on_sheet[f"{place:04d}"] = sample
    return on_sheet


def _write(sample: Tensor, path: Path, rate: int, fps: int) -> None:
    """Write an image, a sound, or a video with a folder of frames, which other tools read."""
    from dtq.evaluate import mp4
    from dtq.evaluate.metrics import images
    from dtq.io.atomic import atomic_write, make_directory

    suffix, data = images.encoded(sample, rate)
    make_directory(path.parent)
    atomic_write(path.with_suffix(suffix), data)
    if sample.ndim == 4:
        if fps:
            mp4.write(sample, path.with_suffix(".mp4"), fps)
        make_directory(path)
        for k, frame in enumerate(sample):
            atomic_write(path / f"{k:04d}.png", images.file(frame))


def _write_sheet(samples: Sequence[Tensor], count: int, output: Path) -> str:
    """Write a contact sheet of the first samples, if they can be shown; returns what they are."""
    import torch

    from dtq.evaluate.metrics import images
    from dtq.io.atomic import atomic_write

    first = samples[0]
    kind = {2: "sounds", 3: "images", 4: f"videos of {len(first)} frames"}[first.ndim]
    if first.ndim == 2 or any(sample.shape != first.shape for sample in samples):
        return kind
    rows = [torch.stack(list(samples[i : i + 8])) for i in range(0, len(samples), 8)]
    if first.ndim == 4:  # a row of frames each
        rows = [images.strip(video) for video in samples]
    sheet = images.sheet(rows, scale=2 if first.shape[-1] <= 128 else 1)
    atomic_write(output / "sheet.png", images.png(sheet))
    if len(samples) == count:
        return f"{kind} and sheet.png"
    return f"{kind}, {len(samples)} of them on sheet.png"
