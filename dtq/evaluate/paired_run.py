# SPDX-License-Identifier: Apache-2.0
"""A candidate and its float model on the same inputs and seeds: the values of every sample."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.evaluate import requested_metrics, trajectory
from dtq.evaluate.embeddings import quantized_text_encoders
from dtq.evaluate.fingerprint import fingerprint, hardware, recipe_of
from dtq.evaluate.gate.metrics import EQUAL_DB
from dtq.evaluate.metrics import images, sound, video
from dtq.evaluate.run_file import Run, Sample
from dtq.evaluate.trajectory import Trajectory
from dtq.pipelines import call_defaults, prompts
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.settings import SamplingSettings, seed_of
from dtq.runs.workers import SINGLE_PROCESS, Workers
from dtq.version import __version__

log = logging.getLogger("dtq")

Progress = Callable[[str], None]
"""Receives a line about each phase of the work."""

Errors = list[tuple[int, int, float]]
"""For each call: position of the first sample of its batch, step, and error."""


def rerun_settings(settings: SamplingSettings, batch_invariant: bool) -> SamplingSettings:
    """The same job with another batch size, to measure the numerical noise of the float model.

    The re-run has batch size 1 where possible: GEMMs of many rows are often bit-identical for every
    number of rows, GEMMs of few rows are not.

    Args:
        settings: of the job.
        batch_invariant: result of :func:`is_batch_invariant`; where it is False, batch size 1 would
            be another job, and the re-run has batch size 2 or 3.
    """
    size = min(settings.batch_size, settings.samples)
    if batch_invariant:
        return replace(settings, batch_size=1 if size > 1 else 2)
    return replace(settings, batch_size={1: 1, 2: 3}.get(size, 2))


def is_batch_invariant(
    reference: LoadedModel, requests: prompts.Requests, settings: SamplingSettings
) -> bool:
    """Whether the transformers get inputs of equal shapes, batch aside, for batch sizes 1 and 2.

    Latte, for example, removes the padding of the prompt if there is one prompt only, and replaces
    it by zeros if there are several.
    """

    def shapes(batch_size: int) -> list[torch.Size]:
        """Shapes of the tensors of the first call, without the batch dimension."""
        how = replace(settings, batch_size=batch_size)
        run = trajectory.record(reference.pipeline, reference.models(), requests, how, range(1))
        values = [v for call in run.calls[:1] for v in (*call.args, *call.kwargs.values())]
        return [value.shape[1:] for value in values if isinstance(value, Tensor)]

    return shapes(1) == shapes(2)


@dataclass
class EvaluationJob:
    """Two runs of the float model, with which any number of candidates is compared.

    Attributes:
        reference: the float model.
        settings: of the job; values that the user left open are filled in.
        requests: of all processes.
        places: positions in ``requests`` that this process samples.
        truth: the run that candidates are compared with.
        rerun: a second run with another batch size, for the noise.
        rerun_batch_size: of that run.
    """

    reference: LoadedModel
    settings: SamplingSettings
    requests: prompts.Requests
    places: list[int]
    truth: Trajectory
    rerun: Trajectory
    rerun_batch_size: int


@dataclass
class CandidateRun:
    """Results of one candidate for the samples of one process, or the merged results of all.

    Attributes:
        run: the values that ``dtq gate`` compares.
        errors: teacher-forced, by row of the table of models.
        divergence: free-running.
        images: one for each sample, by ``float`` and ``candidate``.
    """

    run: Run
    errors: dict[str, Errors]
    divergence: Errors
    images: dict[str, Tensor]


def observe(
    reference: LoadedModel,
    settings: SamplingSettings,
    progress: Progress = lambda line: None,
    workers: Workers = SINGLE_PROCESS,
) -> EvaluationJob:
    """Run the float pipeline twice over this process's share of the requests.

    Args:
        reference: the float pipeline.
        settings: of the job.
        progress: receives a line per run.
        workers: processes that share the samples.

    Raises:
        InputError: the images have several sizes.
    """
    settings = call_defaults.of(reference.pipeline).fill(settings)
    # nested: a run with more samples starts with the same samples
    requests = prompts.load(settings.prompts, reference.pipeline, settings.samples, nested=True)
    invariant = settings.samples < 2 or is_batch_invariant(reference, requests, settings)
    other = rerun_settings(settings, invariant)
    places = workers.shard(len(requests.entries), math.lcm(settings.batch_size, other.batch_size))
    progress("float pipeline")
    models = reference.models()
    truth = trajectory.record(reference.pipeline, models, requests, settings, places)
    for name, count in call_counts(truth, models).items():
        if not count:
            log.warning(
                f"{reference.name}: this job never calls {name}, so it is not evaluated; another "
                "number of --steps may call it"
            )
    if len({batch.shape[1:] for batch in truth.images}) > 1:
        raise InputError(
            "images of several sizes cannot be compared; choose one size: --arg height=512 "
            "--arg width=512"
        )
    progress("float pipeline again with another batch size, to measure the noise")
    rerun = trajectory.record(reference.pipeline, models, requests, other, places)
    return EvaluationJob(reference, settings, requests, places, truth, rerun, other.batch_size)


def call_counts(run: Trajectory, models: Mapping[str, nn.Module]) -> dict[str, int]:
    """Number of calls of each transformer."""
    counts = Counter(call.model for call in run.calls)
    return {name: counts[name] for name in models}


def compare(job: EvaluationJob, candidate: LoadedModel) -> CandidateRun:
    """Run a candidate on the float model's inputs, and by itself from the same seeds.

    Args:
        job: the float runs.
        candidate: the quantized pipeline.

    Returns:
        Its results; the caller adds rows of other models to ``errors``.
    """
    models = candidate.models()
    outputs = trajectory.replayed(job.truth, models)
    own = trajectory.record(candidate.pipeline, models, job.requests, job.settings, job.places)
    quantized = [*models.values(), *quantized_text_encoders(candidate).values()]
    samples, forced = _samples(job), job.truth.by_sample(outputs)
    ids = [sample.id for sample in samples]
    run = Run(
        candidate.name,
        job.reference.name,
        _conditions(job, candidate),
        _identity(job.reference, candidate, quantized),
        samples,
        _values(ids, job.truth, forced, own),
        _values(ids, job.rerun, forced, own),
        _failures(ids, job.truth, own),
    )
    return CandidateRun(
        run,
        {candidate.name: with_positions(job, trajectory.call_errors(job.truth, outputs))},
        with_positions(job, trajectory.free_running(job.truth, own)),
        {"float": torch.cat(job.truth.images), "candidate": torch.cat(own.images)},
    )


def _identity(
    reference: LoadedModel, candidate: LoadedModel, quantized: Sequence[nn.Module]
) -> dict[str, str]:
    """What both models are; a candidate that another engine runs is its file."""
    own, run = fingerprint(*reference.models().values()), candidate.engine
    if run is None:
        own_recipe = recipe_of(*quantized)
        return {"checkpoint": fingerprint(*quantized), "reference": own, "recipe": own_recipe}
    return {
        "checkpoint": run.sha256[:16],
        "reference": own,
        "recipe": run.recipe or "unknown",
        "file": run.file,
        "sha256": run.sha256,
    }


def with_positions(job: EvaluationJob, errors: Sequence[tuple[int, float]]) -> Errors:
    """Add the position of the first sample of its batch to each error of ``job.truth.calls``."""
    rows, start, batch = [], 0, -1
    for step, error in errors:
        if step == 0:
            start += len(job.truth.images[batch]) if batch >= 0 else 0
            batch += 1
        rows.append((job.places[start], step, error))
    return rows


def add_perceptual_metric(
    metric: str, job: EvaluationJob, candidate: CandidateRun, weights: str
) -> None:
    """Add a perceptual metric of every sample to the run, or the reason why it is missing.

    Args:
        metric: name in ``PERCEPTUAL``.
        job: the float runs.
        candidate: its ``run`` gets the values.
        weights: local path or hub id of the metric's weights, or empty.
    """
    run = candidate.run
    ids = [sample.id for sample in run.samples]
    texts = [sample.prompt for sample in run.samples]
    floats, own = map(_stills, candidate.images.values())
    again = _stills(torch.cat(job.rerun.images))
    try:
        values, rerun = requested_metrics.perceptual(metric, own, floats, again, texts, weights)
    except InputError as error:
        run.missing[metric] = str(error)
        return
    run.values[metric] = dict(zip(ids, values, strict=True))
    run.rerun[metric] = dict(zip(ids, rerun, strict=True))


def _stills(batch: Tensor) -> Tensor:
    """Images, or the middle frame of each video."""
    return batch if batch.ndim == 4 else batch[:, batch.shape[1] // 2]


def video_metrics(candidate: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Every metric of videos (B, F, 3, H, W) against the float model's, each (B,)."""
    energy = video.frame_energy(candidate) / video.frame_energy(reference).clamp(min=1e-12)
    energy = energy.clamp(min=1e-12)
    return {
        "flicker": video.flicker_excess(candidate, reference),
        "flickering": video.temporal_flickering(candidate),
        # lost motion is as bad as added motion
        "frame-energy": torch.maximum(energy, 1 / energy),
        "temporal-psnr": video.temporal_psnr(candidate, reference).clamp(max=EQUAL_DB),
        "temporal-ssim": video.temporal_ssim(candidate, reference),
    }


def _conditions(job: EvaluationJob, candidate: LoadedModel) -> dict[str, Any]:
    """The conditions of a run: the job, and the machine."""
    settings, reference = job.settings, job.reference
    calls, engine = call_counts(job.truth, reference.models()), candidate.engine
    images_argument = {"images": settings.images} if settings.images else {}
    return {
        "prompts": job.requests.name,
        "samples": len(job.requests.entries),
        "steps": job.truth.steps(),
        "guidance": settings.described_guidance,
        "seed": settings.seed,
        "torch": torch.__version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        **({"calls": calls} if len(calls) > 1 else {}),
        "sampler": type(getattr(reference.pipeline, "scheduler", None)).__name__,
        "pipeline_args": settings.pipeline_args | images_argument,
        "batch_size": settings.batch_size,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "dtq": __version__,
        "hardware": hardware(candidate.model),
        **({"engine": engine.versions} if engine and engine.engine != "dtq" else {}),
    }


def _samples(job: EvaluationJob) -> list[Sample]:
    texts = prompts.texts(job.requests, job.reference.pipeline)
    return [Sample(f"{i:04d}", texts[i], seed_of(job.settings.seed, i)) for i in job.places]


def _values(
    ids: Sequence[str], reference: Trajectory, forced: list[list[Tensor]], own: Trajectory
) -> dict[str, dict[str, Any]]:
    """Every metric of every sample against a run of the float model.

    Args:
        ids: of the samples.
        reference: the float run to compare with.
        forced: teacher-forced outputs of the candidate, ``[sample][step]``.
        own: the candidate's own run.
    """
    outputs = reference.by_sample([call.output for call in reference.calls])
    error = trajectory.sample_errors(forced, outputs)
    latents = (run.by_sample([call.latents for call in run.calls]) for run in (own, reference))
    distance = trajectory.sample_errors(*latents)
    # both runs enter the first step with the same noise
    divergence = [steps[1:] or steps for steps in distance]
    columns: dict[str, Sequence[Any]] = {"error": error, "divergence": divergence}
    candidates, floats = torch.cat(own.images), torch.cat(reference.images)
    if floats.ndim == 3:
        found = sound.sound_metrics(candidates, floats)
        found["snr"] = found["snr"].clamp(max=EQUAL_DB)
        columns |= {k: v.tolist() for k, v in found.items()}
    else:
        psnr = images.psnr(candidates, floats).clamp(max=EQUAL_DB)
        columns["psnr"] = psnr.tolist()
        flat = [batch.reshape(-1, *batch.shape[-3:]) for batch in (candidates, floats)]
        for metric, of_frames in (("ssim", images.ssim), ("color", images.color_shift)):
            columns[metric] = of_frames(*flat).reshape(len(floats), -1).mean(1).tolist()
    if floats.ndim == 5 and floats.shape[1] > 1:
        columns |= {k: v.tolist() for k, v in video_metrics(candidates, floats).items()}
    return {metric: dict(zip(ids, column, strict=True)) for metric, column in columns.items()}


def _failures(ids: Sequence[str], truth: Trajectory, own: Trajectory) -> dict[str, str]:
    """Samples that are not usable images, by id."""
    failures = {}
    batches = torch.cat(truth.images), torch.cat(own.images)
    for name, float_image, candidate_image in zip(ids, *batches, strict=True):
        for model, image in (("float model", float_image), ("candidate", candidate_image)):
            if flaw := images.flaw(image):
                failures[name] = f"the image of the {model} {flaw}"
    return failures
