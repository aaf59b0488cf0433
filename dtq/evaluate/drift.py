# SPDX-License-Identifier: Apache-2.0
"""Per-step error against the float model: teacher-forced, and free-running.

Teacher-forced is the primary metric. The float pipeline runs once and every call of its
transformer is recorded; each model is then given the *same* inputs, so one step's error cannot
grow into the next and the figure has little variance. Free-running error lets it grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dtq.calibrate import sets
from dtq.calibrate.calls import Recorded, relative_error, replay
from dtq.calibrate.engine import run_pipeline
from dtq.calibrate.record import watch_calls
from dtq.errors import InputError
from dtq.recipe import Calibration


@dataclass
class Trajectory:
    """What a pipeline did: calls of its transformer and the finished pictures.

    Attributes:
        calls: in order.
        pictures: what the pipeline returned, see :func:`finished`.
    """

    calls: list[Recorded] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)

    def steps(self) -> int:
        return 1 + max((call.step for call in self.calls), default=-1)


@torch.no_grad()
def record(
    pipeline: Any, model: nn.Module, requests: sets.Requests, how: Calibration
) -> Trajectory:
    """Run the pipeline over the requests and keep every call of ``model``."""
    trajectory = Trajectory()

    def run() -> Iterator[None]:
        for result in run_pipeline(pipeline, requests, how):
            trajectory.pictures.append(finished(result))
            yield

    watch_calls(model, run, trajectory.calls.append)
    return trajectory


@torch.no_grad()
def teacher_forced(trajectory: Trajectory, model: nn.Module) -> list[float]:
    """Relative squared error of the model's output per step, on the recorded inputs.

    Returns:
        One number per step: ``|q - f|^2 / |f|^2`` averaged over the calls of that step.
    """
    sums = [0.0] * trajectory.steps()
    counts = [0] * trajectory.steps()
    for call in trajectory.calls:
        sums[call.step] += relative_error(replay(model, call), call.output)
        counts[call.step] += 1
    return [s / max(1, c) for s, c in zip(sums, counts, strict=True)]


def free_running(reference: Trajectory, candidate: Trajectory) -> list[float]:
    """Relative squared distance of the latents that enter each step, both runs from one seed."""
    sums = [0.0] * reference.steps()
    counts = [0] * reference.steps()
    for want, got in zip(reference.calls, candidate.calls, strict=True):
        sums[want.step] += relative_error(got.latents, want.latents)
        counts[want.step] += 1
    return [s / max(1, c) for s, c in zip(sums, counts, strict=True)]


def finished(result: Any) -> Tensor:
    """What a pipeline returned, float on the CPU.

    Returns:
        Pictures (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], or sounds (B, channels, samples).

    Raises:
        InputError: it returned none of these.
    """
    for kind in ("images", "frames", "audios"):
        if hasattr(result, kind):
            made = torch.as_tensor(getattr(result, kind)).detach().float().cpu()
            return made if kind == "audios" else made.clamp(0, 1)
    raise InputError(f"{type(result).__name__}: neither images, frames nor audios")


def rate(pipeline: Any) -> int:
    """Samples of a sound in a second, as the autoencoder of a pipeline says."""
    config = getattr(getattr(pipeline, "vae", None), "config", {})
    return int(config.get("sampling_rate", 44100))
