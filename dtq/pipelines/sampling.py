# SPDX-License-Identifier: Apache-2.0
"""Call a pipeline, or a bare transformer on random inputs."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Container, Iterator
from typing import Any

import torch

from dtq.errors import InputError
from dtq.pipelines import call_defaults, image_inputs, prompts
from dtq.pipelines.loading import LoadedModel, dummy_inputs
from dtq.pipelines.settings import SamplingSettings

log = logging.getLogger("dtq")


def run_pipeline(
    pipeline: Any,
    requests: prompts.Requests,
    settings: SamplingSettings,
    output: str = "pt",
    only: Container[int] | None = None,
) -> Iterator[Any]:
    """Generate the requests batch by batch; yields the pipeline's outputs.

    With ``only`` those batches whose first request has its place there.

    The latents of a request depend on the seed and its place, not on the batch size.

    Raises:
        InputError: the pipeline takes no such argument, or refuses what it is given.
    """
    settings = call_defaults.of(pipeline).fill(settings)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    options: dict[str, Any] = {"output_type": output}
    if settings.steps:
        options["num_inference_steps"] = settings.steps
    if settings.guidance:
        options["guidance_scale"] = settings.guidance
    options = {k: v for k, v in options.items() if k in parameters}
    for name in settings.pipeline_args:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {list(parameters)}"
            raise InputError(f"{type(pipeline).__name__} takes no argument {name!r}; {hint}")
    options |= settings.pipeline_args
    beside = image_inputs.wanted(pipeline, settings)
    batch = beside.batch(settings.batch_size)
    if beside.warning and (only is None or 0 in only):  # once, not with every batch
        log.warning("%s: %s", type(pipeline).__name__, beside.warning)
    shown = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        starts = range(0, len(requests.entries), batch)
        for start in starts if only is None else filter(only.__contains__, starts):
            entries = list(requests.entries[start : start + batch])
            generators = [
                torch.Generator().manual_seed(seed_of(settings.seed, start + i))
                for i in range(len(entries))
            ]
            asked = {requests.argument: entries} | beside.of(start)
            try:
                result = pipeline(**asked, generator=generators, **options)
            except (TypeError, ValueError, NameError) as error:
                raise InputError(
                    f"{type(pipeline).__name__} did not take the call ({type(error).__name__}: "
                    f"{error}); arguments beside the prompt: {sorted(options)}"
                ) from error
            yield result
    finally:
        pipeline.set_progress_bar_config(**shown)


def seed_of(seed: int, place: int) -> int:
    """Seed of the latents of the request at a place."""
    return seed * 1_000_003 + place


def count_dummy_calls(settings: SamplingSettings) -> int:
    """How often a bare transformer is called."""
    return max(settings.num_timestep_bins, -(-settings.samples // settings.batch_size) * 4)


def dummy_batches(loaded: LoadedModel, settings: SamplingSettings) -> Iterator[dict[str, Any]]:
    """Random calls over the whole trajectory, noisiest first as a sampler goes."""
    family = loaded.family
    if family is None:
        dummy_inputs(loaded.model, 1, 0.0, 0)  # raises, with the way out
        return
    calls = count_dummy_calls(settings)
    for i in range(calls):
        share = 1 - (i + 0.5) / calls
        timestep = share * family.largest_timestep
        yield dummy_inputs(loaded.model, settings.batch_size, timestep, settings.seed + i)
