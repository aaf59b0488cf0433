# SPDX-License-Identifier: Apache-2.0
"""Dimensions of VBench as metrics of a run: the videos as MP4, and one value per video."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dtq.errors import InputError
from dtq.evaluate import mp4, optional_packages, vbench
from dtq.evaluate.gate.metrics import VBENCH
from dtq.evaluate.run_file import Run, Value
from dtq.io.checksum import file_digest
from dtq.io.schema import check_name

log = logging.getLogger("dtq")


@dataclass(frozen=True)
class VBenchRequest:
    """What to score, and where the package ``vbench`` is.

    Attributes:
        dimensions: names of ``VBENCH``; empty: none, or all that ``results`` has.
        python: interpreter of the environment that has the package.
        cache: folder of its weights; nothing is downloaded.
        results: a result file that was made elsewhere, for the candidate's videos.
        timeout: in seconds, for the videos of one model.
        mp4: write the videos even if nothing scores them here.
    """

    dimensions: tuple[str, ...] = ()
    python: Path | None = None
    cache: Path | None = None
    results: Path | None = None
    timeout: float = 3600.0
    mp4: bool = False

    @property
    def writes(self) -> bool:
        """Whether the videos are written."""
        return self.mp4 or bool(self.dimensions and self.results is None)

    def check(self) -> None:
        """Find mistakes before anything runs.

        Raises:
            InputError: an unknown dimension; neither an interpreter nor a result file, or no such
                file; or the package that writes MP4 is missing.
        """
        problems: list[str] = []
        for name in self.dimensions:
            check_name(name, VBENCH, "--vbench", problems, "dimension")
        for option, file in (
            ("--vbench-python", self.python),
            ("--vbench-cache", self.cache),
            ("--vbench-results", self.results),
        ):
            if file is not None and not file.exists():
                problems.append(f"{option} {file}: no such file or folder")
        if self.dimensions and self.python is None and self.results is None:
            problems.append(
                "--vbench needs --vbench-python PATH, the interpreter of an environment with the "
                "package (make vbench-env), or --vbench-results FILE"
            )
        if problems:
            raise InputError("\n".join(problems))
        if self.writes:
            optional_packages.need("imageio_ffmpeg", "dtq[video]")


def score(
    request: VBenchRequest,
    run: Run,
    videos: Mapping[str, Tensor],
    folder: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the videos of a run and add ``vbench.<dimension>`` of each, or why it is missing.

    The noise is the change of the float model's own value in its second run.

    Args:
        request: dimensions, and the package or a result of it.
        run: its values are added to.
        videos: (B, F, 3, H, W) in [0, 1] by ``float``, ``rerun`` and ``candidate``.
        folder: gets ``videos/<model>/<sample>.mp4``; results in ``vbench/<model>``.
        progress: receives a line per model.
    """
    asked = request.dimensions or (("*",) if request.results else ())
    names = [f"{sample.id}.mp4" for sample in run.samples]
    if any(batch.ndim != 5 for batch in videos.values()):
        if request.mp4:
            log.warning("%s makes no videos, so no MP4 file is written", run.candidate)
        reason = "VBench scores videos, and this model makes none"
        run.missing |= {f"vbench.{name}": reason for name in asked}
        return
    if request.writes:
        for model, batch in videos.items():
            place = folder / "videos" / model
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            for name, video in zip(names, batch, strict=True):
                mp4.write(video, place / name, lossless=True)
    try:
        if request.results is not None:
            _import(request.results, request.dimensions, run, names)
        elif request.dimensions:
            _measure(request, run, folder, progress)
    except InputError as error:
        run.missing |= {f"vbench.{name}": str(error) for name in asked}


def _import(file: Path, dimensions: tuple[str, ...], run: Run, names: list[str]) -> None:
    """Add the values of a result file; the change of the float model's values is not known."""
    if not dimensions:
        dimensions = tuple(d for d in VBENCH if d in _keys(file))
    if not dimensions:
        raise InputError(f"{file}: has none of the dimensions {', '.join(VBENCH)}")
    for dimension, scores in vbench.read(file, dimensions, names).items():
        values: dict[str, Value] = {Path(name).stem: value for name, value in scores.videos.items()}
        run.values[f"vbench.{dimension}"] = run.rerun[f"vbench.{dimension}"] = values
    run.conditions["vbench"] = {"results": file_digest(file), "noise": "not measured"}


def _keys(file: Path) -> list[str]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    return list(data) if isinstance(data, dict) else []


def _measure(
    request: VBenchRequest, run: Run, folder: Path, progress: Callable[[str], None]
) -> None:
    """Run the package on the videos of each model."""
    assert request.python is not None
    prompts = {f"{sample.id}.mp4": sample.prompt for sample in run.samples}
    scores = {}
    for model in ("float", "rerun", "candidate"):
        progress(f"VBench, {', '.join(request.dimensions)}: {model}")
        out = folder / "vbench" / model
        shutil.rmtree(out, ignore_errors=True)
        scores[model] = vbench.run(
            folder / "videos" / model, request.dimensions, out, python=request.python,
            cache=request.cache, prompts=prompts, timeout=request.timeout,
        )  # fmt: skip
    for dimension in request.dimensions:
        first, again, own = (scores[m][dimension].videos for m in ("float", "rerun", "candidate"))
        run.values[f"vbench.{dimension}"] = {Path(n).stem: own[n] for n in prompts}
        run.rerun[f"vbench.{dimension}"] = {
            Path(n).stem: own[n] + again[n] - first[n] for n in prompts
        }
