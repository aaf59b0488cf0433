# SPDX-License-Identifier: Apache-2.0
"""Calls of the float model, kept whole: what candidates are compared on, teacher-forced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from dtq.calibrate import sets
from dtq.calibrate.engine import made_up, run_pipeline, timestep_of
from dtq.errors import InputError
from dtq.recipe import Calibration
from dtq.source import Source


@dataclass
class Recorded:
    """One call of the transformer, on the CPU.

    Attributes:
        step: position in its sampling run.
        args, kwargs: of its forward.
        output: its first output.
        timestep: that it was called with, 0 if it takes none.
    """

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    timestep: float = 0.0


@torch.no_grad()
def watch_calls(
    model: nn.Module, run: Callable[[], Iterable[object]], keep: Callable[[Recorded], None]
) -> None:
    """Give every call that ``run`` makes of ``model`` to ``keep``, steps counted per item of run.

    Args:
        model: the transformer.
        run: drives it; yields after every sampling run.
        keep: takes each call as it ends.
    """
    step = 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal step
        output = first_tensor(out).detach().cpu().clone()
        when = timestep_of(module, args, kwargs)
        keep(Recorded(step, _kept(args), _kept(kwargs), output, when))
        step += 1

    with _hooked(model, hook):
        for _ in run():
            step = 0


def sample_calls(
    source: Source,
    calibration: Calibration,
    count: int,
    *,
    inputs: Iterable[dict[str, Any]] | None = None,
) -> list[Recorded]:
    """One sampling run of the float model, all of its calls.

    Args:
        source: the model; a bare transformer runs on ``inputs``, or on made-up ones.
        calibration: the sampler's settings.
        count: pictures that are generated together, at most one calibration batch.
        inputs: keyword arguments of forwards.

    Returns:
        The calls in order; latents and outputs of every step.
    """
    calls: list[Recorded] = []
    pipeline = source.pipeline
    if inputs is None and pipeline is not None:
        once = replace(calibration, samples=min(count, calibration.batch))
        once = replace(once, batch=once.samples)
        requests = sets.load(once.set, pipeline, once.samples)

        def run() -> Iterable[object]:
            return run_pipeline(pipeline, requests, once, output="latent")
    else:
        given = list(inputs) if inputs is not None else list(made_up(source, calibration))

        def run() -> Iterable[object]:
            # a run of its own each: nothing says that they follow one another
            yield [source.model(**_moved(kwargs, source.model)) for kwargs in given]

    watch_calls(source.model, run, calls.append)
    return calls


def spread(calls: list[Recorded], count: int) -> list[Recorded]:
    """At most ``count`` of the calls, evenly over the trajectory, whole guidance pairs together.

    Where the sampler calls once for each branch, calls come in pairs with equal timesteps.
    """
    moments: list[list[Recorded]] = []
    for call in calls:
        if moments and moments[-1][0].timestep == call.timestep and len(moments[-1]) < 2:
            moments[-1].append(call)
        else:
            moments.append([call])
    size = max(map(len, moments), default=1)
    wanted = max(1, min(len(moments), count // size))
    picked = [moments[(2 * i + 1) * len(moments) // (2 * wanted)] for i in range(wanted)]
    return [call for moment in picked for call in moment]


@torch.no_grad()
def replay(model: nn.Module, call: Recorded) -> Tensor:
    """The model's first output on a recorded call, on the CPU."""
    device = next(model.parameters()).device
    out = model(*send_to_device(call.args, device), **send_to_device(call.kwargs, device))
    return first_tensor(out).cpu()


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a diffusers transformer returns.

    The first entry of an output class or tuple; the pictures of a list as one tensor.

    Raises:
        InputError: there is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list) and output and all(isinstance(t, Tensor) for t in output):
        same = all(t.shape == output[0].shape for t in output)
        return torch.stack(output) if same else torch.cat([t.flatten() for t in output])
    entries = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(entries, list | tuple):
        for entry in entries:
            if isinstance(entry, Tensor | Mapping | list | tuple) and len(entry):
                return first_tensor(entry)
    raise InputError(
        f"a model that returns {type(output).__name__} without a tensor is no denoiser"
    )


@contextmanager
def _hooked(model: nn.Module, hook: Any) -> Iterator[None]:
    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _moved(value: Any, model: nn.Module) -> Any:
    return send_to_device(value, next(model.parameters()).device)


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: _kept(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_kept(v) for v in value)
    return value
