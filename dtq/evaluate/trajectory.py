# SPDX-License-Identifier: Apache-2.0
"""Per-step error against the float model: teacher-forced, and free-running.

Teacher-forced is the primary metric. The float pipeline runs once and every call of its
transformers is recorded (Wan 2.2 has one for the noisy steps and one for the others). Each model
then gets the *same* inputs, so the error of one step cannot grow into the next, and the metric has
little variance. In a free-running comparison the error grows.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.evaluate.metrics.images import shown
from dtq.linalg.relative_error import relative_error
from dtq.pipelines import prompts
from dtq.pipelines.recorded_calls import RecordedCall, replay
from dtq.pipelines.recording import watch_calls
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings

Models = nn.Module | Mapping[str, nn.Module]
"""The transformer of a pipeline, or its transformers by component name if it has several."""


@dataclass
class Trajectory:
    """One run of a pipeline.

    Attributes:
        calls: of the transformers, in order.
        images: the output of each batch, see :func:`dtq.evaluate.metrics.images.shown`.
    """

    calls: list[RecordedCall] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)

    def steps(self) -> int:
        """Number of sampler steps."""
        return 1 + max((call.step for call in self.calls), default=-1)

    def by_sample(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Split one tensor per call into one tensor per sample and step.

        Guidance puts both branches into one batch, one after the other, so row r belongs to
        sample r mod B.

        Args:
            tensors: one for each of ``calls``, with the rows of its batch in the first dimension.

        Returns:
            ``[sample][step]``, each of shape (branches, ...).

        Raises:
            InputError: the rows of a call are not a multiple of the samples of its batch.
        """
        samples: list[list[Tensor]] = []
        batch = -1
        for call, tensor in zip(self.calls, tensors, strict=True):
            batch += call.step == 0
            count = len(self.images[batch])
            if len(tensor) % count:
                raise InputError(
                    f"a call for {count} samples has {len(tensor)} rows, so the rows cannot be "
                    f"assigned to samples; evaluate with --batch 1"
                )
            rows = tensor.reshape(len(tensor) // count, count, *tensor.shape[1:]).unbind(1)
            if call.step == 0:
                samples += [[] for _ in range(count)]
            for steps, row in zip(samples[-count:], rows, strict=True):
                steps.append(row)
        return samples


@torch.no_grad()
def record(
    pipeline: Any,
    model: Models,
    requests: prompts.Requests,
    settings: SamplingSettings,
    only: Container[int] | None = None,
) -> Trajectory:
    """Run a pipeline over requests and record every call of its transformers.

    Args:
        pipeline: of diffusers.
        model: its transformers.
        requests: prompts or labels.
        settings: steps, guidance, seed and batch size.
        only: positions in ``requests``; batches that begin elsewhere are skipped. Default: all.
    """
    trajectory = Trajectory()

    def run() -> Iterator[None]:
        for result in run_pipeline(pipeline, requests, settings, only=only):
            trajectory.images.append(shown(result))
            yield

    watch_calls(_by_name(model), run, trajectory.calls.append)
    return trajectory


@torch.no_grad()
def teacher_forced(trajectory: Trajectory, model: Models) -> list[float]:
    """Relative squared error of a model per step, on the recorded inputs.

    Returns:
        One number per step: ``|q - f|^2 / |f|^2`` averaged over the calls of that step.
    """
    return mean_by_step(call_errors(trajectory, replayed(trajectory, model)))


@torch.no_grad()
def replayed(trajectory: Trajectory, model: Models) -> list[Tensor]:
    """Outputs of other transformers for the inputs of every recorded call."""
    models = _by_name(model)
    return [replay(models[call.model], call) for call in trajectory.calls]


def call_errors(trajectory: Trajectory, outputs: Sequence[Tensor]) -> list[tuple[int, float]]:
    """Step and relative squared error of one output per call."""
    pairs = zip(trajectory.calls, outputs, strict=True)
    return [(call.step, relative_error(output, call.output)) for call, output in pairs]


def mean_by_step(errors: Sequence[tuple[int, float]]) -> list[float]:
    """Mean of the errors of each step, noisiest first."""
    steps = 1 + max((step for step, _ in errors), default=-1)
    sums, counts = [0.0] * steps, [0] * steps
    for step, error in errors:
        sums[step] += error
        counts[step] += 1
    return [s / max(1, c) for s, c in zip(sums, counts, strict=True)]


def sample_errors(outputs: list[list[Tensor]], reference: list[list[Tensor]]) -> list[list[float]]:
    """Relative squared error ``[sample][step]`` of two results of :meth:`Trajectory.by_sample`."""
    samples = zip(outputs, reference, strict=True)
    return [[relative_error(a, b) for a, b in zip(*pair, strict=True)] for pair in samples]


def free_running(reference: Trajectory, candidate: Trajectory) -> list[tuple[int, float]]:
    """Step and relative squared distance of the latents of each call; both runs have one seed."""
    pairs = zip(reference.calls, candidate.calls, strict=True)
    return [(a.step, relative_error(b.latents, a.latents)) for a, b in pairs]


def _by_name(model: Models) -> Mapping[str, nn.Module]:
    return {"transformer": model} if isinstance(model, nn.Module) else model
