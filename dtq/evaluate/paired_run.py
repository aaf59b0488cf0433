# SPDX-License-Identifier: Apache-2.0
"""A candidate run beside its float model, same inputs, same seeds: the values of every sample."""

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
from dtq.evaluate.fingerprint import fingerprint, hardware, recipe_of
from dtq.evaluate.gate.metrics import EQUAL_DB
from dtq.evaluate.metrics import images, video
from dtq.evaluate.run_file import Run, Sample
from dtq.pipelines import call_defaults, prompts
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.sampling import seed_of
from dtq.pipelines.settings import SamplingSettings
from dtq.runs.workers import SINGLE_PROCESS, Workers
from dtq.version import __version__

log = logging.getLogger("dtq")

Progress = Callable[[str], None]


def other_batches(settings: SamplingSettings, alike: bool) -> SamplingSettings:
    """The same job in other batches: what then differs is the noise of the float model.

    One by one: products of many rows are often bit-identical however many they are, those of few
    are not.

    Args:
        how: the job.
        alike: whether the pipeline does the same for one sample as for several, see
            :func:`one_is_as_several`; where it does not, one by one would be another job.
    """
    size = min(settings.batch_size, settings.samples)
    if alike:
        return replace(settings, batch_size=1 if size > 1 else 2)
    return replace(settings, batch_size={1: 1, 2: 3}.get(size, 2))


def one_is_as_several(
    reference: LoadedModel, requests: prompts.Requests, settings: SamplingSettings
) -> bool:
    """Whether the transformers are given the same, rows aside, for a sample alone and for two.

    Latte cuts the padding of a prompt that comes alone, and makes it zero in company.
    """
    alone, together = (
        trajectory.record(
            reference.pipeline,
            reference.models(),
            requests,
            replace(settings, batch_size=n),
            range(1),
        )
        for n in (1, 2)
    )
    return _shapes(alone) == _shapes(together)


def _shapes(trajectory: trajectory.Trajectory) -> list[tuple[int, ...]]:
    """Of the tensors of the first call, without their rows."""
    return [
        tuple(given.shape[1:])
        for call in trajectory.calls[:1]
        for given in (*call.args, *call.kwargs.values())
        if isinstance(given, Tensor)
    ]


@dataclass
class EvaluationJob:
    """What the float model did, once for any number of candidates.

    Attributes:
        requests: all of them; ``places`` are those of this process.
        truth: what candidates are compared with.
        again: the same in other batches, for the noise floor.
    """

    reference: LoadedModel
    settings: SamplingSettings
    requests: prompts.Requests
    places: list[int]
    truth: trajectory.Trajectory
    again: trajectory.Trajectory


@dataclass
class CandidateRun:
    """What one candidate did: teacher-forced ``outputs``, its own run, the values of the gate."""

    outputs: list[Tensor]
    ran: trajectory.Trajectory
    run: Run


def observe(
    reference: LoadedModel,
    settings: SamplingSettings,
    progress: Progress = lambda line: None,
    workers: Workers = SINGLE_PROCESS,
) -> EvaluationJob:
    """Run the float pipeline twice, over what this process has of the requests."""
    settings = call_defaults.of(reference.pipeline).fill(settings)
    # nested: more samples later are these and others
    requests = prompts.load(settings.prompts, reference.pipeline, settings.samples, nested=True)
    alike = settings.samples < 2 or one_is_as_several(reference, requests, settings)
    other = other_batches(settings, alike)
    places = workers.shard(len(requests.entries), math.lcm(settings.batch_size, other.batch_size))
    progress("float pipeline")
    models = reference.models()
    truth = trajectory.record(reference.pipeline, models, requests, settings, places)
    for name, count in calls_of(truth, models).items():
        if not count:
            log.warning(
                "%s: %s is not called in this job, so it is not judged; another number of --steps "
                "may reach it",
                reference.name,
                name,
            )
    if len({made.shape[1:] for made in truth.pictures}) > 1:
        raise InputError(
            "pictures of several sizes cannot be compared; ask for one: --arg height=512 "
            "--arg width=512"
        )
    progress("float pipeline again, other batches, for the noise floor")
    again = trajectory.record(reference.pipeline, models, requests, other, places)
    return EvaluationJob(reference, settings, requests, places, truth, again)


def calls_of(trajectory: trajectory.Trajectory, models: Mapping[str, nn.Module]) -> dict[str, int]:
    """How often each transformer was called."""
    counted = Counter(call.model for call in trajectory.calls)
    return {name: counted[name] for name in models}


def compare(job: EvaluationJob, candidate: LoadedModel) -> CandidateRun:
    """Run a candidate on the float model's inputs and on its own, from the same seeds.

    Args:
        job: what the float model did.
        candidate: the quantized pipeline.
    """
    how, models = job.settings, candidate.models()
    outputs = trajectory.replayed(job.truth, models)
    ran = trajectory.record(candidate.pipeline, models, job.requests, how, job.places)
    samples = _samples(job)
    ids = [sample.id for sample in samples]
    run = Run(
        candidate.name,
        job.reference.name,
        _conditions(how, job.requests) | _job(how, job.reference, candidate, job.truth),
        {
            "checkpoint": fingerprint(*models.values()),
            "reference": fingerprint(*job.reference.models().values()),
            "recipe": recipe_of(*models.values()),
        },
        samples,
        _values(ids, job.truth, job.truth, outputs, ran),
        _values(ids, job.truth, job.again, outputs, ran),
        _failures(ids, job.truth, ran),
    )
    if ran.pictures[0].ndim == 5:
        _video_values(run, job, ran)
    return CandidateRun(outputs, ran, run)


def pair_values(metric: str, job: EvaluationJob, seen: CandidateRun, where: str) -> None:
    """A perceptual figure of every sample into the run, or why it is not there."""
    ids = [sample.id for sample in seen.run.samples]
    prompts = [sample.prompt for sample in seen.run.samples]
    got, want, again = (_stills(torch.cat(t.pictures)) for t in (seen.ran, job.truth, job.again))
    try:
        first, second = requested_metrics.pair(metric, got, want, again, prompts, where)
    except InputError as error:
        seen.run.missing[metric] = str(error)
        return
    seen.run.values[metric] = dict(zip(ids, first, strict=True))
    seen.run.rerun[metric] = dict(zip(ids, second, strict=True))


def _stills(shown: Tensor) -> Tensor:
    """Pictures, or the middle frame of each video."""
    return shown if shown.ndim == 4 else shown[:, shown.shape[1] // 2]


def _video_values(run: Run, job: EvaluationJob, ran: trajectory.Trajectory) -> None:
    """Figures of frames over time; runs of one frame have none."""
    got, want, again = (torch.cat(t.pictures) for t in (ran, job.truth, job.again))
    if got.shape[1] < 2:
        return
    for table, right in ((run.values, want), (run.rerun, again)):
        for metric, values in video_values(got, right).items():
            ids = (sample.id for sample in run.samples)
            table[metric] = dict(zip(ids, values.tolist(), strict=True))


def video_values(got: Tensor, want: Tensor) -> dict[str, Tensor]:
    """Every figure of videos (B, F, 3, H, W) against the float model's, each (B,)."""
    energy = video.frame_energy(got) / video.frame_energy(want).clamp(min=1e-12)
    energy = energy.clamp(min=1e-12)
    return {
        "flicker": video.flicker_excess(got, want),
        "flickering": video.temporal_flickering(got),
        # motion that is lost is as bad as motion that is new
        "frame-energy": torch.maximum(energy, 1 / energy),
        "temporal-psnr": video.temporal_psnr(got, want).clamp(max=EQUAL_DB),
        "temporal-ssim": video.temporal_ssim(got, want),
    }


def _conditions(settings: SamplingSettings, requests: prompts.Requests) -> dict[str, Any]:
    return {
        "prompts": requests.name,
        "samples": len(requests.entries),
        "steps": settings.steps or "pipeline default",
        "guidance": settings.guidance or "pipeline default",
        "seed": settings.seed,
        "torch": torch.__version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def _job(
    settings: SamplingSettings,
    reference: LoadedModel,
    candidate: LoadedModel,
    truth: trajectory.Trajectory,
) -> dict[str, Any]:
    """What a comparison with another run has to know."""
    scheduler = getattr(reference.pipeline, "scheduler", None)
    calls = calls_of(truth, reference.models())
    return ({"calls": calls} if len(calls) > 1 else {}) | {
        "steps": truth.steps(),
        "sampler": type(scheduler).__name__,
        "pipeline_args": settings.pipeline_args
        | ({"images": settings.images} if settings.images else {}),
        "batch_size": settings.batch_size,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "dtq": __version__,
        "hardware": hardware(candidate.model),
    }


def _samples(job: EvaluationJob) -> list[Sample]:
    labels = getattr(job.reference.pipeline, "labels", None) or {}
    names, entries = {number: name for name, number in labels.items()}, job.requests.entries
    return [
        Sample(f"{i:04d}", str(names.get(entries[i], entries[i])), seed_of(job.settings.seed, i))
        for i in job.places
    ]


def _values(
    ids: Sequence[str],
    truth: trajectory.Trajectory,
    want: trajectory.Trajectory,
    outputs: Sequence[Tensor],
    ran: trajectory.Trajectory,
) -> dict[str, dict[str, Any]]:
    """Every metric of every sample against a run of the float model.

    Args:
        ids: of the samples.
        truth: whose inputs ``outputs`` are replies to.
        want: the run to compare with.
        outputs: of the candidate, teacher-forced.
        ran: the candidate's own run.
    """
    floats = want.by_sample([call.output for call in want.calls])
    error = trajectory.sample_errors(truth.by_sample(outputs), floats)
    apart = trajectory.sample_errors(
        ran.by_sample([call.latents for call in ran.calls]),
        want.by_sample([call.latents for call in want.calls]),
    )
    shown, right = torch.cat(ran.pictures), torch.cat(want.pictures)
    # both runs enter the first step with the same noise
    columns: dict[str, Sequence[Any]] = {
        "error": error,
        "divergence": [steps[1:] or steps for steps in apart],
    }
    if right.ndim > 3:  # a sound has no such measures
        likeness = images.psnr(shown, right).clamp(max=EQUAL_DB)
        frames = len(right) if right.ndim == 4 else right.shape[0] * right.shape[1]
        flat = (x.reshape(frames, *x.shape[-3:]) for x in (shown, right))
        same = images.ssim(*flat).reshape(len(right), -1).mean(1)
        columns |= {"psnr": likeness.tolist(), "ssim": same.tolist()}
    return {metric: dict(zip(ids, column, strict=True)) for metric, column in columns.items()}


def _failures(
    ids: Sequence[str], truth: trajectory.Trajectory, ran: trajectory.Trajectory
) -> dict[str, str]:
    """Samples that are no picture, by id."""
    found = {}
    made = torch.cat(truth.pictures), torch.cat(ran.pictures)
    for name, right, shown in zip(ids, *made, strict=True):
        for who, picture in (("the float model", right), ("the candidate", shown)):
            if why := images.flaw(picture):
                found[name] = f"{who} made {why}"
    return found
