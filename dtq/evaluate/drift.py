# SPDX-License-Identifier: Apache-2.0
"""Per-step error against the float model: teacher-forced, and free-running.

Teacher-forced is the primary metric. The float pipeline runs once and every call of its
transformer is recorded; each model is then given the *same* inputs, so one step's error cannot
grow into the next and the figure has little variance. Free-running error lets it grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dtq.calibrate import sets
from dtq.calibrate.engine import run_pipeline
from dtq.recipe import Calibration


@dataclass
class Recorded:
    """One call of the transformer: arguments, output, position in its sampling run."""

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass
class Trajectory:
    """What a pipeline did: calls of its transformer and the finished pictures.

    Attributes:
        calls: in order.
        pictures: float (B, 3, H, W) in [0, 1] on the CPU, or the pipeline's own output for video.
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
    trajectory, step = Trajectory(), 0

    def watch(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        nonlocal step
        call = Recorded(step, _kept(args), _kept(kwargs), _first(output).detach().cpu().clone())
        trajectory.calls.append(call)
        step += 1

    with _hook(model, watch):
        for result in run_pipeline(pipeline, requests, how):
            step = 0
            trajectory.pictures.append(_pictures(result))
    return trajectory


@torch.no_grad()
def teacher_forced(trajectory: Trajectory, model: nn.Module) -> list[float]:
    """Relative squared error of the model's output per step, on the recorded inputs.

    Returns:
        One number per step: ``|q - f|^2 / |f|^2`` averaged over the calls of that step.
    """
    device = next(model.parameters()).device
    sums = [0.0] * trajectory.steps()
    counts = [0] * trajectory.steps()
    for call in trajectory.calls:
        output = _first(model(*_to(call.args, device), **_to(call.kwargs, device))).cpu()
        sums[call.step] += relative_error(output, call.output)
        counts[call.step] += 1
    return [s / max(1, c) for s, c in zip(sums, counts, strict=True)]


def free_running(reference: Trajectory, candidate: Trajectory) -> list[float]:
    """Relative squared distance of the latents that enter each step, both runs from one seed."""
    sums = [0.0] * reference.steps()
    counts = [0] * reference.steps()
    for want, got in zip(reference.calls, candidate.calls, strict=True):
        sums[want.step] += relative_error(_latents(got), _latents(want))
        counts[want.step] += 1
    return [s / max(1, c) for s, c in zip(sums, counts, strict=True)]


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want|^2 / |want|^2`` in float64; infinite when ``got`` is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    difference = got.double() - want.double()
    return float(difference.square().sum() / want.double().square().sum().clamp(min=1e-300))


@contextmanager
def _hook(model: nn.Module, watch: Any) -> Iterator[None]:
    handle = model.register_forward_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _latents(call: Recorded) -> Tensor:
    found = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor)]
    return found[0]


def _first(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    value = output[0]
    assert isinstance(value, Tensor)
    return value


def _pictures(result: Any) -> Tensor:
    frames = result.images if hasattr(result, "images") else result.frames
    pictures = torch.as_tensor(frames).detach().float().cpu()
    return pictures.clamp(0, 1)


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: _kept(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_kept(v) for v in value)
    return value


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(v, device) for v in value)
    return value
