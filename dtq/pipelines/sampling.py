# SPDX-License-Identifier: Apache-2.0
"""Call a pipeline batch by batch, or a bare transformer with random inputs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from dtq.errors import LIBRARY_ERRORS, InputError, first_line, hint
from dtq.pipelines import call_defaults, image_inputs, prompts
from dtq.pipelines.contents import diffusion_transformers, text_encoders
from dtq.pipelines.loading import LoadedModel, out_of_memory
from dtq.pipelines.settings import SamplingSettings, seed_of
from dtq.pipelines.tracing import dummy_inputs

log = logging.getLogger("dtq")


def run_pipeline(
    pipeline: Any,
    requests: prompts.Requests,
    settings: SamplingSettings,
    output: str = "pt",
    only: Container[int] | None = None,
) -> Iterator[Any]:
    """Generate the requests batch by batch.

    The latents of a request depend on the seed and the index of the request, not on the batch size.

    Args:
        pipeline: a diffusers pipeline.
        requests: prompts or labels to generate.
        settings: sampler settings; sizes that they do not give come from the pipeline's folder.
        output: the ``output_type`` of the pipeline call; ``pt`` gives tensors.
        only: indices of requests; only batches whose first request is among them are generated.
            None: all.

    Yields:
        The output of the pipeline for each batch.

    Raises:
        InputError: the pipeline has no text encoder, takes no such argument, or rejects its value.
    """
    settings = call_defaults.of(pipeline).fill(settings)
    options = _options(pipeline, settings, output)
    _check_text_encoders(pipeline, requests.argument)
    images = image_inputs.required(pipeline, settings)
    batch = images.batch(settings.batch_size)
    if images.warning and (only is None or 0 in only):  # once, not for every batch
        log.warning("%s: %s", type(pipeline).__name__, images.warning)
    progress_bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        starts = range(0, len(requests.entries), batch)
        for start in starts if only is None else filter(only.__contains__, starts):
            count = len(requests.entries[start : start + batch])
            seeds = [seed_of(settings.seed, start + i) for i in range(count)]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            args = requests.arguments(start, batch) | images.of(start)
            what = requests.argument or "the image"
            more = f"arguments in addition to {what}: {_shown(options)}"
            with translate_call_errors(type(pipeline).__name__, more):
                result = pipeline(**args, generator=generators, **options)
            yield result
    finally:
        pipeline.set_progress_bar_config(**progress_bar)


def batch_starts(pipeline: Any, requests: prompts.Requests, settings: SamplingSettings) -> range:
    """Index of the first request of each batch that :func:`run_pipeline` generates."""
    settings = call_defaults.of(pipeline).fill(settings)
    batch = image_inputs.required(pipeline, settings).batch(settings.batch_size)
    return range(0, len(requests.entries), batch)


class _PromptsEncodedError(Exception):
    """Every text encoder has been called, and the sampling begins."""


def run_text_encoders(
    pipeline: Any, requests: prompts.Requests, settings: SamplingSettings, start: int
) -> None:
    """Encode the prompts of one batch as a sampling run does, and stop before the sampling.

    The run stops at the first call of a denoiser when every text encoder has been called: pipelines
    of two stages encode the prompts of the second stage after they have sampled the first.

    Args:
        pipeline: a diffusers pipeline.
        requests: prompts to generate.
        settings: sampler settings.
        start: index of the first request of the batch.

    Raises:
        InputError: as :func:`run_pipeline`.
    """
    waiting = set(text_encoders(pipeline))

    def stop(*args: Any) -> None:
        if not waiting:
            raise _PromptsEncodedError

    with ExitStack() as hooks:
        for name in sorted(waiting):
            called = partial(_discard, waiting, name)
            # some pipelines call a part of the model and never its forward
            for module in getattr(pipeline, name).modules():
                if isinstance(module, nn.Embedding):
                    hooks.enter_context(module.register_forward_pre_hook(called))
        for name in diffusion_transformers(pipeline):
            denoiser = getattr(pipeline, name)
            hooks.enter_context(denoiser.register_forward_pre_hook(stop))
        with suppress(_PromptsEncodedError):
            list(run_pipeline(pipeline, requests, settings, "latent", [start]))


def _discard(names: set[str], name: str, *args: Any) -> None:
    names.discard(name)


@contextmanager
def translate_call_errors(what: str, advice: str) -> Iterator[None]:
    """Convert what libraries raise for arguments that they cannot use to one line.

    Args:
        what: the class that is called.
        advice: end of the message.

    Raises:
        InputError: the call was refused; the library's error is the cause.
    """
    try:
        yield
    except LIBRARY_ERRORS as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{what} rejected the call ({first_line(error)}); {advice}") from error


def _shown(options: dict[str, Any]) -> str:
    texts = [f"{name}={value!r}"[:80] for name, value in options.items()]
    return ", ".join(text if text.isprintable() else text.split("=")[0] for text in texts)


def _check_text_encoders(pipeline: Any, argument: str) -> None:
    """Refuse prompts where a pipeline was loaded without its text encoders or tokenizers."""
    for kind in ("text_encoder", "tokenizer") if argument == "prompt" else ():
        parts = {n: m for n, m in pipeline.components.items() if n.startswith(kind)}
        if parts and all(part is None for part in parts.values()):
            raise InputError(
                f"{type(pipeline).__name__} has no {' and no '.join(parts)}, which prompts need: "
                f"load the whole pipeline, or give dtq.quantize its transformer alone with "
                f"inputs=[...], a list of keyword arguments of its forward"
            )


def _options(pipeline: Any, settings: SamplingSettings, output: str) -> dict[str, Any]:
    """Arguments of every call, in addition to prompts, images and generators."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    options: dict[str, Any] = {"output_type": output}
    if settings.steps:
        options["num_inference_steps"] = settings.steps
    if settings.guidance is not None:
        options["guidance_scale"] = settings.guidance
        if "guidance_scale" not in parameters:
            raise InputError(
                f"{type(pipeline).__name__} takes no guidance_scale; leave guidance out, or give "
                f"its own argument: --arg NAME=VALUE, calibration.pipeline_args"
            )
    for name in settings.pipeline_args:
        if name not in parameters:
            words = hint(name, parameters, f"it takes {list(parameters)}")
            raise InputError(f"{type(pipeline).__name__} takes no argument {name!r}; {words}")
    return {k: v for k, v in options.items() if k in parameters} | settings.pipeline_args


def never_called(loaded: LoadedModel, settings: SamplingSettings) -> InputError:
    """The error for a transformer that its pipeline did not call in a whole sampling run."""
    steps = f"{settings.steps} steps" if settings.steps else "the pipeline's own number of steps"
    others = [name for name in loaded.models() if name != loaded.component]
    return InputError(
        f"{type(loaded.pipeline).__name__} never called {loaded.component} in {steps}: take more "
        f"(--steps, calibration.steps), or quantize only {' and '.join(others) or 'another one'} "
        f"(--component, component=)"
    )


def count_dummy_calls(settings: SamplingSettings) -> int:
    """Number of calls of a bare transformer with random inputs."""
    return max(settings.num_timestep_bins, -(-settings.samples // settings.batch_size) * 4)


def dummy_batches(loaded: LoadedModel, settings: SamplingSettings) -> Iterator[dict[str, Any]]:
    """Random inputs over the whole trajectory, from the noisiest timestep to the cleanest.

    Raises:
        InputError: dtq has no inputs for a model of this class.
    """
    family = loaded.family
    if family is None:
        dummy_inputs(loaded.model, 1, 0.0, 0)  # raises the error
        return
    calls = count_dummy_calls(settings)
    for i in range(calls):
        timestep = (1 - (i + 0.5) / calls) * family.largest_timestep
        yield dummy_inputs(loaded.model, settings.batch_size, timestep, settings.seed + i)
