# SPDX-License-Identifier: Apache-2.0
"""What each component of a quantized pipeline adds to the error: it alone is quantized.

The component takes its place in the float pipeline, which samples the same requests. The error of a
step is measured with the latents of the float run: of a denoiser on recorded inputs, of a text
encoder by the float denoiser's output for the prompts that it encodes
(``dtq.pipelines.recorded_sampling``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dtq.errors import InputError
from dtq.evaluate import trajectory
from dtq.evaluate.embeddings import is_quantized, quantized_text_encoders
from dtq.evaluate.merge import by_step
from dtq.evaluate.metrics import images
from dtq.evaluate.paired_run import EvaluationJob, Progress, with_positions
from dtq.evaluate.run_file import Contribution
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.recorded_calls import replay
from dtq.pipelines.recorded_sampling import RecordedSampling


def quantized_components(candidate: LoadedModel) -> dict[str, nn.Module]:
    """The models of a pipeline that are quantized, or that an engine runs.

    Raises:
        InputError: there are none.
    """
    denoisers = candidate.models().items()
    parts = {n: m for n, m in denoisers if candidate.engine is not None or is_quantized(m)}
    parts |= quantized_text_encoders(candidate)
    vae = getattr(candidate.pipeline, "vae", None)
    if isinstance(vae, nn.Module) and is_quantized(vae):
        parts["vae"] = vae
    if not parts:
        raise InputError(f"{candidate.name} has no quantized component; leave --components out")
    return parts


def contributions(
    job: EvaluationJob, candidate: LoadedModel, progress: Progress
) -> list[Contribution]:
    """Measure every quantized component of a candidate alone.

    Args:
        job: the float runs, over all samples.
        candidate: the quantized pipeline.
        progress: receives a line for each component.
    """
    sampling = None
    if quantized_text_encoders(candidate):
        progress("float pipeline, recorded for the text encoders")
        sampling = RecordedSampling.of(job.reference, job.requests, job.settings)
    rows = []
    for name, model in quantized_components(candidate).items():
        progress(f"only {name} quantized")
        rows.append(_alone(job, name, model, sampling))
    whole = sum(row.error for row in rows if row.error is not None)
    return [replace(row, share=row.error / whole if row.error else row.error) for row in rows]


def _alone(
    job: EvaluationJob, name: str, model: nn.Module, sampling: RecordedSampling | None
) -> Contribution:
    """The contribution of a component, without its share."""
    pipeline, denoisers = job.reference.pipeline, job.reference.models()
    error = None
    with _in_place(pipeline, name, model):
        if name in denoisers:
            error = _of_denoiser(job, name, model)
        elif name != "vae":
            assert sampling is not None
            error = _of_text_encoder(job, sampling)
        models = job.reference.models() | ({name: model} if name in denoisers else {})
        own = trajectory.record(pipeline, models, job.requests, job.settings, job.places)
    distance = by_step(with_positions(job, trajectory.free_running(job.truth, own)))
    got, want = torch.cat(own.images), torch.cat(job.truth.images)
    psnr = float(images.psnr(got, want).median()) if want.ndim > 3 else None
    return Contribution(name, error, None, distance[-1], psnr)


def _of_denoiser(job: EvaluationJob, name: str, model: nn.Module) -> float:
    """Its calls are replayed; those of other denoisers have no error."""
    calls = job.truth.calls
    outputs = [replay(model, call) if call.model == name else call.output for call in calls]
    return _mean(trajectory.mean_by_step(trajectory.call_errors(job.truth, outputs)))


def _of_text_encoder(job: EvaluationJob, sampling: RecordedSampling) -> float:
    """The float denoisers get the embeddings that the pipeline's text encoder gives now."""
    denoisers = job.reference.models()
    outputs = [replay(denoisers[call.model], call) for call in sampling.again()]
    recorded = trajectory.Trajectory(sampling.calls)
    return _mean(trajectory.mean_by_step(trajectory.call_errors(recorded, outputs)))


@contextmanager
def _in_place(pipeline: Any, name: str, model: nn.Module) -> Iterator[None]:
    """A component of a pipeline, replaced inside."""
    before = getattr(pipeline, name)
    setattr(pipeline, name, model)
    try:
        yield
    finally:
        setattr(pipeline, name, before)


def _mean(errors: list[float]) -> float:
    return sum(errors) / max(1, len(errors))
