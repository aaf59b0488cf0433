# SPDX-License-Identifier: Apache-2.0
"""Record calls of the float model, with which candidates are compared (teacher forcing)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from dtq.models import is_text_encoder
from dtq.models.timestep import timestep_of
from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.recorded_calls import RecordedCall, copy_to_cpu, first_tensor
from dtq.pipelines.sampling import dummy_batches, run_pipeline, run_text_encoders
from dtq.pipelines.settings import SamplingSettings


@torch.no_grad()
def watch_calls(
    models: Mapping[str, nn.Module],
    run: Callable[[], Iterable[object]],
    keep: Callable[[RecordedCall], None],
) -> None:
    """Pass every call of the models to ``keep`` while ``run`` runs.

    Args:
        models: the transformers by name; their calls are counted as one trajectory.
        run: calls the models; yields after every sampling run, which restarts the step count.
        keep: receives each call when it ends.
    """
    step = 0

    def record(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal step
        output = first_tensor(output).detach().cpu().clone()
        timestep = timestep_of(module, args, kwargs)
        keep(RecordedCall(step, copy_to_cpu(args), copy_to_cpu(kwargs), output, timestep, name))
        step += 1

    with ExitStack() as hooks:
        for name, model in models.items():
            hook = model.register_forward_hook(partial(record, name), with_kwargs=True)
            hooks.enter_context(hook)
        for _ in run():
            step = 0


def sample_calls(
    loaded: LoadedModel,
    settings: SamplingSettings,
    count: int,
    *,
    inputs: Iterable[dict[str, Any]] | None = None,
) -> list[RecordedCall]:
    """Record all calls of one sampling run of the float model.

    Args:
        loaded: the model; a bare transformer runs on ``inputs``, or on random inputs.
        settings: sampler settings of the calibration.
        count: images that are generated together, at most one calibration batch.
        inputs: keyword arguments of forwards; None runs the pipeline.

    Returns:
        The calls in order, with the inputs and the output of every step; empty if the pipeline
        never called the model in these steps.
    """
    calls: list[RecordedCall] = []
    pipeline = loaded.pipeline
    if inputs is None and pipeline is not None:
        number = min(count, settings.batch_size)
        once = replace(settings, samples=number, batch_size=number)
        requests = prompts.load(once.prompts, pipeline, number)

        def run() -> Iterable[object]:
            if is_text_encoder(loaded.model):
                run_text_encoders(pipeline, requests, once, 0)
                yield None
            else:
                yield from run_pipeline(pipeline, requests, once, output="latent")
    else:
        batches = list(dummy_batches(loaded, settings) if inputs is None else inputs)

        def run() -> Iterable[object]:
            device = next(loaded.model.parameters()).device
            yield [loaded.model(**send_to_device(batch, device)) for batch in batches]

    watch_calls({loaded.component: loaded.model}, run, calls.append)
    return calls
