# SPDX-License-Identifier: Apache-2.0
"""``dtq eval``: a candidate beside its float model, same seeds, same job."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dtq.errors import InputError
from dtq.evaluate import baselines as others
from dtq.evaluate import requested_metrics, trajectory
from dtq.evaluate.merge import RunShard, by_step, merge_shards, placed
from dtq.evaluate.metrics import extractors, images
from dtq.evaluate.metrics.distributions import MetricValue
from dtq.evaluate.metrics.extractors import Extractor
from dtq.evaluate.paired_run import Progress, compare, observe, pair_values, video_values
from dtq.evaluate.requested_metrics import ImageSet, MetricRequest, MetricResults
from dtq.evaluate.run_file import Run
from dtq.nn.linear import QuantLinear
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.settings import SamplingSettings
from dtq.runs.workers import SINGLE_PROCESS, Workers


@dataclass
class ResultRow:
    """One model's figures.

    Attributes:
        error: teacher-forced relative squared error, mean over steps: the primary metric.
        error_steps: the same per step, noisiest first.
        divergence: free-running relative squared distance of latents per step.
        bits: stored bits per weight of the quantized attention and feed-forward linears.
        psnr: dB against the float model's picture of the same seed, median.
        psnr_worst: dB of the worst picture.
        ssim: mean.
        fid_float: domain FID against the float model's pictures.
        fid_real: domain FID against the training pictures, where known.
        temporal: of videos, mean of each figure of ``video_values``.
    """

    name: str
    error: float
    error_steps: list[float]
    divergence: list[float] = field(default_factory=list)
    bits: float | None = None
    psnr: float | None = None
    psnr_worst: float | None = None
    ssim: float | None = None
    fid_float: float | None = None
    fid_real: float | None = None
    temporal: dict[str, float] = field(default_factory=dict)


@dataclass
class Evaluation:
    """The whole result.

    Attributes:
        pictures: rows of the contact sheet.
        run: for the gate.
        figures: of whole sets of pictures, and ``crowds``, what they were computed from.
        command: that made it, for the report.
    """

    candidate: str
    reference: str
    conditions: dict[str, Any]
    rows: list[ResultRow]
    images: dict[str, Tensor] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    fid_real_float: float | None = None
    run: Run | None = None
    metrics: list[MetricValue] = field(default_factory=list)
    image_sets: dict[str, ImageSet] = field(default_factory=dict)
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, pictures left out."""
        return {
            **(self.run.to_json() if self.run else {}),
            "candidate": self.candidate,
            "reference": self.reference,
            "conditions": self.conditions,
            "fid_real_float": self.fid_real_float,
            "rows": [asdict(row) for row in self.rows],
            "metrics": requested_metrics.to_json(self.metrics),
        }


def evaluate(
    candidate: LoadedModel,
    reference: LoadedModel,
    settings: SamplingSettings,
    *,
    baselines: Sequence[str] = (),
    request: MetricRequest | None = None,
    progress: Progress = lambda line: None,
    workers: Workers = SINGLE_PROCESS,
    folder: Path | None = None,
) -> Evaluation | None:
    """Compare a quantized pipeline with its float one.

    Args:
        candidate: the quantized pipeline.
        reference: the float one.
        how: requests, steps, guidance, seed and batch of both.
        baselines: rows of other libraries, names of ``baselines.BASELINES``.
        asked: figures beyond those that every run has.
        say: told what is being done.
        team: processes that share the samples.
        folder: that all of them see, for what they tell each other; one process needs none.

    Returns:
        The result on the first process, None on the others.

    Raises:
        InputError: a bare transformer, models that do not belong together, or baselines of a
            candidate without a quantized layer.
    """
    if candidate.pipeline is None or reference.pipeline is None:
        raise InputError("eval needs pipelines on both sides; these are bare transformers")
    models, floats = candidate.models(), reference.models()
    kinds, known = ({n: type(m).__name__ for n, m in x.items()} for x in (models, floats))
    if kinds != known:
        raise InputError(
            f"{candidate.name} has {kinds}, {reference.name} {known}: not the same model"
        )
    names = {part: list(compared_layers(model)) for part, model in models.items()}
    request = request or MetricRequest()
    request.check()
    for name in baselines:
        others.find(name)
    if baselines and not any(names.values()):
        raise InputError(f"{candidate.name} has no quantized layer that others could quantize too")
    job = observe(reference, settings, progress, workers)
    progress("candidate, teacher-forced and free-running")
    seen = compare(job, candidate)
    for name in request.pairs:
        pair_values(name, job, seen, request.where.get(name, ""))
    mine, bits = RunShard.of(job, seen), {candidate.name: stored_bits(*models.values())}
    for name in baselines:
        progress(f"baseline {name}")
        errors, bits[name] = _baseline(name, floats, names, job.truth)
        mine.errors[name] = placed(job, errors)
    share = merge_shards(workers, folder, mine, len(job.requests.entries))
    found = MetricResults()
    if request.distributions:
        found = requested_metrics.distributions(
            candidate, reference, job.settings, request, progress, workers, folder
        )
    if share is None:
        return None
    result = _result(candidate.name, reference.name, share, bits)
    if request.distributions:
        result.metrics, result.image_sets = found.metrics, found.image_sets
        share.run.missing |= found.missing
        share.run.conditions["fid_samples"] = request.samples
        _fid_cells(result.rows[0], result)
    return result


def _result(
    candidate: str, reference: str, share: RunShard, bits: Mapping[str, float | None]
) -> Evaluation:
    rows = [row_of(name, by_step(errors)) for name, errors in share.errors.items()]
    for row in rows:
        row.bits = bits[row.name]
    compare_images(rows[0], share.floats, share.made)
    rows[0].divergence = by_step(share.divergence)
    result = Evaluation(candidate, reference, share.run.conditions, rows, run=share.run)
    result.images = {"float": share.floats, candidate: share.made}
    return result


def row_of(name: str, steps: list[float]) -> ResultRow:
    return ResultRow(name, sum(steps) / max(1, len(steps)), steps)


def _baseline(
    name: str,
    models: Mapping[str, nn.Module],
    names: Mapping[str, Sequence[str]],
    truth: trajectory.Trajectory,
) -> tuple[list[tuple[int, float]], float]:
    """Errors of the calls of another library, and its bits per weight."""
    baseline = others.find(name)
    changed = {part: copy.deepcopy(model) for part, model in models.items()}
    bits, weights = 0.0, 0
    for part, layers in names.items():
        if layers:
            baseline.apply(changed[part], layers)
        for layer in layers:
            count: int = models[part].get_submodule(layer).weight.numel()  # type: ignore[union-attr, operator, assignment]
            bits += baseline.bits(changed[part].get_submodule(layer)) * count
            weights += count
    return trajectory.call_errors(truth, trajectory.replayed(truth, changed)), bits / weights


def compare_images(row: ResultRow, want: Tensor, got: Tensor) -> None:
    """Figures of the candidate's pictures ``got`` against the float model's."""
    if want.ndim == 3:  # sound has no such measures
        return
    if want.ndim == 5 and want.shape[1] > 1:
        row.temporal = {k: float(v.mean()) for k, v in video_values(got, want).items()}
    if want.ndim == 5:  # video: frames are pictures
        want, got = want.flatten(0, 1), got.flatten(0, 1)
    values = images.psnr(got, want)
    row.psnr, row.psnr_worst = float(values.median()), float(values.min())
    row.ssim = float(images.ssim(got, want).mean())


def compared_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers that also quantize their input, by name; where there are none, all quantized."""
    every = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    return {n: m for n, m in every.items() if m.activation_format != "none"} or every


def stored_bits(*models: nn.Module) -> float | None:
    """Stored bits per weight of :func:`judged_layers`; None where there are none."""
    layers = [layer for model in models for layer in compared_layers(model).values()]
    if not layers:
        return None
    stored = sum(spec.nbytes for m in layers for spec in m.tensor_specs().values())
    return 8 * stored / sum(m.in_features * m.out_features for m in layers)


def extractor_for(pipeline: Any) -> Extractor:
    """The bundled feature extractor, for pipelines whose pictures it knows.

    Raises:
        InputError: a pipeline of other pictures.
    """
    if not requested_metrics.bundled(pipeline):
        raise InputError("domain FID is for models of the bundled emoji; leave --fid out")
    return extractors.load("emoji")


def _fid_cells(row: ResultRow, result: Evaluation) -> None:
    """FID where the table of models shows it."""
    for each in result.metrics:
        if each.metric == "fid" and each.against == "float model's pictures":
            row.fid_float = each.value
        if each.metric == "fid" and each.against == "training pictures":
            assert each.change is not None
            row.fid_real, result.fid_real_float = each.value, each.value - each.change


def write_images(result: Evaluation, folder: Path) -> None:
    """``pictures/<float | candidate>/<sample>.png``; of videos animated ones."""
    for side, every in zip(("float", "candidate"), result.images.values(), strict=True):
        (folder / "pictures" / side).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(every):
            if picture.ndim > 2:
                (folder / "pictures" / side / f"{i:04d}.png").write_bytes(images.file(picture))
