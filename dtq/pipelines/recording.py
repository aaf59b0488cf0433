# SPDX-License-Identifier: Apache-2.0
"""Record calls of the float model: what candidates are compared on, teacher-forced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from dtq.models.timestep import timestep_of
from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.recorded_calls import RecordedCall, copied, first_tensor
from dtq.pipelines.sampling import dummy_batches, run_pipeline
from dtq.pipelines.settings import SamplingSettings


@torch.no_grad()
def watch_calls(
    models: Mapping[str, nn.Module],
    run: Callable[[], Iterable[object]],
    keep: Callable[[RecordedCall], None],
) -> None:
    """Give every call that ``run`` makes of the models to ``keep``, steps counted per item of run.

    Args:
        models: the transformers by name; their calls are counted as one trajectory.
        run: drives it; yields after every sampling run.
        keep: takes each call as it ends.
    """
    step = 0

    def hook(name: str) -> Callable[..., None]:
        def take(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> None:
            nonlocal step
            output = first_tensor(out).detach().cpu().clone()
            when = timestep_of(module, args, kwargs)
            keep(RecordedCall(step, copied(args), copied(kwargs), output, when, name))
            step += 1

        return take

    with ExitStack() as hooks:
        for name, model in models.items():
            hooks.enter_context(_hooked(model, hook(name)))
        for _ in run():
            step = 0


def sample_calls(
    loaded: LoadedModel,
    settings: SamplingSettings,
    count: int,
    *,
    inputs: Iterable[dict[str, Any]] | None = None,
) -> list[RecordedCall]:
    """One sampling run of the float model, all of its calls.

    Args:
        source: the model; a bare transformer runs on ``inputs``, or on made-up ones.
        calibration: the sampler's settings.
        count: pictures that are generated together, at most one calibration batch.
        inputs: keyword arguments of forwards.

    Returns:
        The calls in order; latents and outputs of every step.
    """
    calls: list[RecordedCall] = []
    pipeline = loaded.pipeline
    if inputs is None and pipeline is not None:
        once = replace(settings, samples=min(count, settings.batch_size))
        once = replace(once, batch_size=once.samples)
        requests = prompts.load(once.prompts, pipeline, once.samples)

        def run() -> Iterable[object]:
            return run_pipeline(pipeline, requests, once, output="latent")
    else:
        given = list(inputs) if inputs is not None else list(dummy_batches(loaded, settings))

        def run() -> Iterable[object]:
            # a run of its own each: nothing says that they follow one another
            yield [loaded.model(**_moved(kwargs, loaded.model)) for kwargs in given]

    watch_calls({loaded.component: loaded.model}, run, calls.append)
    return calls


@contextmanager
def _hooked(model: nn.Module, hook: Any) -> Iterator[None]:
    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _moved(value: Any, model: nn.Module) -> Any:
    return send_to_device(value, next(model.parameters()).device)
