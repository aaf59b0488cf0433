# SPDX-License-Identifier: Apache-2.0
"""Per-step error against the float model: teacher-forced, and free-running.

Teacher-forced is the primary metric. The float pipeline runs once and every call of its
transformers is recorded, whichever runs: Wan 2.2 has one for the noisy part of the trajectory and
one for the rest. Each model is then given the *same* inputs, so one step's error cannot
grow into the next and the figure has little variance. Free-running error lets it grow.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.evaluate.metrics.images import shown
from dtq.pipelines import prompts
from dtq.pipelines.recorded_calls import RecordedCall, relative_error, replay
from dtq.pipelines.recording import watch_calls
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings

Models = nn.Module | Mapping[str, nn.Module]
"""The transformer of a pipeline; where it has several, all of them by their names there."""


@dataclass
class Trajectory:
    """What a pipeline did: calls of its transformers and the finished pictures.

    Attributes:
        calls: in order.
        pictures: what the pipeline returned, see :func:`finished`.
    """

    calls: list[RecordedCall] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)

    def steps(self) -> int:
        return 1 + max((call.step for call in self.calls), default=-1)

    def by_sample(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of one tensor per call, what belongs to each sample: ``[sample][step]`` (branches, ...).

        Guidance puts both branches into one batch, one after the other, so row r belongs to
        picture r mod B.

        Raises:
            InputError: a call's rows are no multiple of the pictures of its batch.
        """
        found: list[list[Tensor]] = []
        batch = -1
        for call, tensor in zip(self.calls, tensors, strict=True):
            batch += call.step == 0
            count = len(self.pictures[batch])
            if len(tensor) % count:
                raise InputError(
                    f"a call for {count} pictures has {len(tensor)} rows, so they cannot be told "
                    f"apart; evaluate with --batch 1"
                )
            rows = tensor.reshape(len(tensor) // count, count, *tensor.shape[1:]).unbind(1)
            if call.step == 0:
                found += [[] for _ in range(count)]
            for steps, row in zip(found[-count:], rows, strict=True):
                steps.append(row)
        return found


@torch.no_grad()
def record(
    pipeline: Any,
    model: Models,
    requests: prompts.Requests,
    settings: SamplingSettings,
    only: Container[int] | None = None,
) -> Trajectory:
    """Run the pipeline over the requests and keep every call of its transformers.

    With ``only`` the batches that begin at one of those places.
    """
    trajectory = Trajectory()

    def run() -> Iterator[None]:
        for result in run_pipeline(pipeline, requests, settings, only=only):
            trajectory.pictures.append(shown(result))
            yield

    watch_calls(_named(model), run, trajectory.calls.append)
    return trajectory


@torch.no_grad()
def teacher_forced(trajectory: Trajectory, model: Models) -> list[float]:
    """Relative squared error of the model's output per step, on the recorded inputs.

    Returns:
        One number per step: ``|q - f|^2 / |f|^2`` averaged over the calls of that step.
    """
    return mean_by_step(call_errors(trajectory, replayed(trajectory, model)))


@torch.no_grad()
def replayed(trajectory: Trajectory, model: Models) -> list[Tensor]:
    """What other transformers return to every recorded call of theirs."""
    models = _named(model)
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


def sample_errors(got: list[list[Tensor]], want: list[list[Tensor]]) -> list[list[float]]:
    """Relative squared error ``[sample][step]`` of two results of :meth:`Trajectory.by_sample`."""
    return [
        [relative_error(a, b) for a, b in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(got, want, strict=True)
    ]


def free_running(reference: Trajectory, candidate: Trajectory) -> list[tuple[int, float]]:
    """Step and relative squared distance of the latents that enter each call, from one seed."""
    pairs = zip(reference.calls, candidate.calls, strict=True)
    return [(want.step, relative_error(got.latents, want.latents)) for want, got in pairs]


def _named(model: Models) -> Mapping[str, nn.Module]:
    return {"transformer": model} if isinstance(model, nn.Module) else model
