# SPDX-License-Identifier: Apache-2.0
"""``dtq eval``: a candidate compared with its float model, with the same seeds, in one job."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.evaluate import baselines as libraries
from dtq.evaluate import paired_run, requested_metrics, trajectory, vbench_metrics
from dtq.evaluate.components import contributions, quantized_components
from dtq.evaluate.embeddings import embedding_errors
from dtq.evaluate.image_sets import ImageSet
from dtq.evaluate.merge import by_step, merge_shards
from dtq.evaluate.metrics import images
from dtq.evaluate.metrics.distributions import MetricValue
from dtq.evaluate.paired_run import CandidateRun, Progress
from dtq.evaluate.references import FLOAT_IMAGES, TRAINING_IMAGES
from dtq.evaluate.requested_metrics import MetricRequest
from dtq.evaluate.run_file import Run
from dtq.evaluate.vbench_metrics import VBenchRequest
from dtq.nn.linear import QuantLinear
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.settings import SamplingSettings
from dtq.runs.workers import SINGLE_PROCESS, Workers


@dataclass
class ResultRow:
    """The metrics of one model: a row of the table of models.

    Attributes:
        name: of the model.
        error: teacher-forced relative squared error, mean over steps: the primary metric.
        error_steps: the same per step, noisiest first.
        divergence: free-running relative squared distance of latents per step.
        bits: stored bits per weight of :func:`compared_layers`.
        psnr: dB against the float model's image of the same seed, median.
        psnr_worst: dB of the worst image.
        ssim: mean.
        fid_float: domain FID against the float model's images.
        fid_real: domain FID against the training images, if their moments are known.
        temporal: for videos, mean of each metric of ``video_metrics``.
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
    """The result of ``dtq eval``.

    Attributes:
        run: names of both models, conditions, and the values that ``dtq gate`` compares.
        rows: the candidate, then other libraries.
        images: one for each sample, by ``float`` and ``candidate``.
        quantization: contents of ``dtq_report.json``, or empty.
        fid_real_float: the float model's own FID against the training images.
        metrics: distribution metrics.
        image_sets: from which they were computed, by ``float`` and ``candidate``.
        command: the command line, for the report.
        text_encoders: relative squared error of the embeddings of each quantized text encoder.
    """

    run: Run
    rows: list[ResultRow]
    images: dict[str, Tensor] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    fid_real_float: float | None = None
    metrics: list[MetricValue] = field(default_factory=list)
    image_sets: dict[str, ImageSet] = field(default_factory=dict)
    command: str = ""
    text_encoders: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data without images: the contents of ``eval.json``."""
        return {
            **self.run.to_json(),
            "fid_real_float": self.fid_real_float,
            "rows": [asdict(row) for row in self.rows],
            "metrics": [asdict(value) for value in self.metrics],
            **({"text_encoders": self.text_encoders} if self.text_encoders else {}),
        }


def evaluate(
    candidate: LoadedModel,
    reference: LoadedModel,
    settings: SamplingSettings,
    *,
    baselines: Sequence[str] = (),
    request: MetricRequest | None = None,
    vbench: VBenchRequest | None = None,
    progress: Progress = lambda line: None,
    workers: Workers = SINGLE_PROCESS,
    folder: Path | None = None,
    videos_to: Path | None = None,
    components: bool = False,
) -> Evaluation | None:
    """Compare a quantized pipeline with its float one.

    Args:
        candidate: the quantized pipeline.
        reference: the float pipeline.
        settings: prompts, steps, guidance, seed and batch size of both.
        baselines: names of ``BASELINES``; each adds the row of another library.
        request: metrics in addition to those of every run.
        vbench: dimensions of VBench for the videos, which are written to ``videos_to``.
        progress: receives a line about each phase.
        workers: processes that share the samples.
        folder: through which they exchange files; one process needs none.
        videos_to: folder for the videos and the files of VBench.
        components: also measure every quantized component alone.

    Returns:
        The result in the main process, None in the others.

    Raises:
        InputError: a bare transformer, models of different classes, or baselines for a candidate
            without a quantized layer.
    """
    _check_models(candidate, reference)
    models, floats = candidate.models(), reference.models()
    layers = {component: list(compared_layers(model)) for component, model in models.items()}
    request, vbench = request or MetricRequest(), vbench or VBenchRequest()
    request.check()
    vbench.check()
    if vbench.writes and videos_to is None:
        raise InputError("--vbench and --mp4 write videos, which need a folder: -o FOLDER")
    if components:
        _check_components(candidate, workers)
    _check_baselines(baselines, candidate.name, any(layers.values()))
    job = paired_run.observe(reference, settings, progress, workers)
    progress("candidate, teacher-forced and free-running")
    shard = paired_run.compare(job, candidate)
    for name in request.perceptual:
        paired_run.add_perceptual_metric(name, job, shard, request.weights.get(name, ""))
    engine = candidate.engine
    bits = {candidate.name: engine.bits if engine else stored_bits(*models.values())}
    for name in baselines:
        progress(f"baseline {name}")
        of_steps, bits[name] = _baseline(name, floats, layers, job.truth)
        shard.errors[name] = paired_run.with_positions(job, of_steps)
    if vbench.writes:
        shard.images["rerun"] = torch.cat(job.rerun.images)
    merged = merge_shards(workers, folder, shard)
    sets = requested_metrics.distributions(
        candidate, reference, job.settings, request, progress, workers, folder,
        rerun_batch_size=job.rerun_batch_size,
    )  # fmt: skip
    if merged is None:
        return None
    vbench_metrics.score(vbench, merged.run, merged.images, videos_to or Path(), progress)
    merged.images.pop("rerun", None)
    errors = embedding_errors(candidate, job.reference, job.requests, job.settings)
    result = _result(merged, bits, errors)
    if components:
        result.run.components = contributions(job, candidate, progress)
    result.metrics, result.image_sets = sets.metrics, sets.image_sets
    if request.distributions:
        result.run.image_sets, result.run.features = sets.file, sets.features()
        result.run.missing |= sets.missing
        result.run.conditions["fid_samples"] = request.num_images
    _set_fid(result)
    return result


def _check_baselines(baselines: Sequence[str], candidate: str, has_layers: bool) -> None:
    """Refuse unknown libraries, and a candidate without layers for them to quantize."""
    for name in baselines:
        libraries.find(name)
    if baselines and not has_layers:
        raise InputError(f"{candidate} has no quantized layer for other libraries to quantize")


def _check_components(candidate: LoadedModel, workers: Workers) -> None:
    """Refuse components in several processes, and of a model without a quantized one."""
    if workers.size > 1:
        raise InputError("--components needs one process: leave torchrun out, or the option")
    quantized_components(candidate)


def _check_models(candidate: LoadedModel, reference: LoadedModel) -> None:
    """Refuse bare transformers, and models of different classes."""
    if candidate.pipeline is None or reference.pipeline is None:
        raise InputError("eval needs pipelines on both sides; these are bare transformers")
    sides = (candidate.models(), reference.models())
    got, want = ({name: type(m).__name__ for name, m in models.items()} for models in sides)
    if got != want:
        raise InputError(f"{candidate.name} has {got}, {reference.name} {want}: not the same model")


def _result(
    shard: CandidateRun, bits: Mapping[str, float | None], text_encoders: dict[str, float]
) -> Evaluation:
    rows = [result_row(name, by_step(errors)) for name, errors in shard.errors.items()]
    for row in rows:
        row.bits = bits[row.name]
    compare_images(rows[0], *shard.images.values())
    rows[0].divergence = by_step(shard.divergence)
    return Evaluation(shard.run, rows, shard.images, text_encoders=text_encoders)


def result_row(name: str, steps: list[float]) -> ResultRow:
    """A row with the errors of the steps and their mean."""
    return ResultRow(name, sum(steps) / max(1, len(steps)), steps)


def _baseline(
    name: str,
    models: Mapping[str, nn.Module],
    layers: Mapping[str, Sequence[str]],
    truth: trajectory.Trajectory,
) -> tuple[list[tuple[int, float]], float]:
    """Step and error of each call of another library, and its bits per weight."""
    baseline = libraries.find(name)
    changed = {component: copy.deepcopy(model) for component, model in models.items()}
    bits, weights = 0.0, 0
    for component, names in layers.items():
        if names:
            baseline.apply(changed[component], names)
        for layer in names:
            count: int = models[component].get_submodule(layer).weight.numel()  # type: ignore[union-attr, operator, assignment]
            bits += baseline.bits(changed[component].get_submodule(layer)) * count
            weights += count
    return trajectory.call_errors(truth, trajectory.replayed(truth, changed)), bits / weights


def compare_images(row: ResultRow, reference: Tensor, candidate: Tensor) -> None:
    """Fill in the metrics of finished images, videos or sounds.

    Args:
        row: of the candidate.
        reference: images (B, 3, H, W), videos (B, F, 3, H, W) or sounds of the float model.
        candidate: those of the candidate with the same seeds.
    """
    if reference.ndim == 3:  # these metrics are not for sounds
        return
    if reference.ndim == 5 and reference.shape[1] > 1:
        values = paired_run.video_metrics(candidate, reference)
        row.temporal = {name: float(value.mean()) for name, value in values.items()}
    if reference.ndim == 5:  # the frames of a video are images
        reference, candidate = reference.flatten(0, 1), candidate.flatten(0, 1)
    psnr = images.psnr(candidate, reference)
    row.psnr, row.psnr_worst = float(psnr.median()), float(psnr.min())
    row.ssim = float(images.ssim(candidate, reference).mean())


def compared_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Layers with quantized weights and inputs by name; if there are none, all quantized layers."""
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    return {n: m for n, m in quantized.items() if m.activation_format != "none"} or quantized


def stored_bits(*models: nn.Module) -> float | None:
    """Stored bits per weight of :func:`compared_layers`; None without a quantized layer."""
    layers = [layer for model in models for layer in compared_layers(model).values()]
    if not layers:
        return None
    stored = sum(spec.nbytes for m in layers for spec in m.tensor_specs().values())
    return 8 * stored / sum(m.in_features * m.out_features for m in layers)


def _set_fid(result: Evaluation) -> None:
    """Copy FID into the row of the candidate."""
    row = result.rows[0]
    for value in result.metrics:
        if value.metric != "fid":
            continue
        if value.reference == FLOAT_IMAGES:
            row.fid_float = value.value
        if value.reference == TRAINING_IMAGES:
            assert value.change is not None
            row.fid_real, result.fid_real_float = value.value, value.value - value.change


def write_images(result: Evaluation, folder: Path) -> None:
    """Write ``pictures/<float | candidate>/<sample>.png``; videos become animated files."""
    for model, batch in result.images.items():
        (folder / "pictures" / model).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(batch):
            if image.ndim > 2:
                (folder / "pictures" / model / f"{i:04d}.png").write_bytes(images.file(image))
