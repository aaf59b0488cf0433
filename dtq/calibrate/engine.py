# SPDX-License-Identifier: Apache-2.0
"""Run the float model with hooks on its linears, and collect the statistics of their inputs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from dtq.calibrate.collection import Statistics
from dtq.calibrate.gradients import CALLS, Observed, OutputPart, is_part, output_parts
from dtq.calibrate.hooks import CalibrationHooks
from dtq.calibrate.mixed_prompts import MixedPrompts
from dtq.calibrate.observers import OUTPUT_NEEDS, InputStats
from dtq.errors import InputError
from dtq.models import InputGroup, is_text_encoder, sibling_key
from dtq.models.timestep import timestep_of
from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.sampling import (
    batch_starts,
    dummy_batches,
    never_called,
    run_pipeline,
    run_text_encoders,
    translate_call_errors,
)
from dtq.pipelines.settings import SamplingSettings

log = logging.getLogger("dtq")


@dataclass(frozen=True)
class CalibrationRun:
    """What the float model runs on, in batches that do not depend on which process runs them.

    Attributes:
        origin: of the inputs: ``pipeline``, ``given`` or ``random``.
        batches: number of batches.
        run: generates one batch, or calls the bare transformer once.
        first: timestep of the first call, None where the sampler decides.
    """

    origin: str
    batches: int
    run: Callable[[int], object]
    first: float | None = None

    def shards(self, count: int) -> list[range]:
        """The batches in at most ``count`` shards of nearly equal length."""
        count = min(count, self.batches)
        bounds = [i * self.batches // count for i in range(count + 1)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]


def calibration_run(
    loaded: LoadedModel,
    settings: SamplingSettings,
    inputs: Sequence[dict[str, Any]] | None = None,
) -> CalibrationRun:
    """How to run the float model.

    A pipeline runs its own sampler, both branches of guidance included. For a text encoder the same
    run ends at the first step after all prompts were encoded. A bare transformer runs on
    ``inputs``, or with a warning on random latents and conditions of the right shapes.

    Args:
        loaded: the float model.
        settings: how a pipeline is sampled.
        inputs: keyword arguments of the transformer's forward, one mapping per call.

    Raises:
        InputError: there is nothing to run the model on.
    """
    model, pipeline = loaded.model, loaded.pipeline
    if inputs is None and pipeline is not None:
        requests = prompts.load(settings.prompts, pipeline, settings.samples)
        starts = batch_starts(pipeline, requests, settings)

        def generate(i: int) -> None:
            if is_text_encoder(model):
                run_text_encoders(pipeline, requests, settings, starts[i])
            else:
                list(run_pipeline(pipeline, requests, settings, "latent", [starts[i]]))

        return CalibrationRun("pipeline", len(starts), generate)
    origin = "given"
    if inputs is None:
        log.warning(
            "no pipeline and no inputs: calibrating %s on random latents and conditions. "
            "Activations of real images differ; give the pipeline when you have it.",
            type(model).__name__,
        )
        inputs, origin = list(dummy_batches(loaded, settings)), "random"
    if not inputs:
        raise InputError("inputs is empty: nothing to calibrate on")
    calls = inputs
    first = timestep_of(model, (), calls[0])

    def forward(i: int) -> object:
        with translate_call_errors(type(model).__name__, f"it is inputs[{i}]"):
            return model(**calls[i])

    return CalibrationRun(origin, len(calls), forward, first)


def calibrate(
    loaded: LoadedModel,
    observed: Sequence[Observed],
    settings: SamplingSettings,
    needs: frozenset[str],
    *,
    inputs: Iterable[dict[str, Any]] | None = None,
    progress: bool = True,
) -> Statistics:
    """Run the float model in this process and collect statistics in memory, shard by shard.

    Args:
        loaded: the float model.
        observed: from :func:`observed_of`.
        settings: how a pipeline is sampled, the number of shards and of timestep bins.
        needs: statistics to collect, names of ``observers.OBSERVERS``.
        inputs: keyword arguments of the transformer's forward, one mapping per call.
        progress: show a bar with the time left.

    Raises:
        InputError: there is nothing to run the model on.
    """
    run = calibration_run(loaded, settings, None if inputs is None else list(inputs))
    collect = partial(collect_shard, loaded, observed, settings, needs, run, progress=progress)
    first, *others = shards = run.shards(settings.num_shards)
    total = collect(first)
    for batches in others:
        total.merge(collect(batches))
    total.about["num_shards"] = len(shards)
    return fill_from_sibling_experts(total)


def collect_shard(
    loaded: LoadedModel,
    observed: Sequence[Observed],
    settings: SamplingSettings,
    needs: frozenset[str],
    run: CalibrationRun,
    batches: range,
    *,
    progress: bool = True,
) -> Statistics:
    """The statistics of one shard; shards are added up by :meth:`Statistics.merge`.

    Args:
        loaded: the float model.
        observed: from :func:`observed_of`.
        settings: how a pipeline is sampled, and the number of timestep bins.
        needs: statistics to collect, names of ``observers.OBSERVERS``.
        run: from :func:`calibration_run`.
        batches: of the shard.
        progress: show a bar over all batches, those of other shards included.
    """
    period = _gradient_period(loaded, settings, run)
    bins = settings.num_timestep_bins
    hooks = CalibrationHooks(loaded, observed, bins, needs, run.first, period)
    mixes = settings.mixed_prompts if is_text_encoder(loaded.model) else 0
    mixed = MixedPrompts(loaded.model, mixes, settings.seed) if mixes else None
    per_batch = settings.steps if run.origin == "pipeline" else 1 + mixes
    with (
        hooks.attached(),
        mixed.attached() if mixed else nullcontext(),
        torch.no_grad(),
        tqdm(
            total=run.batches * per_batch or None, initial=batches.start * per_batch,
            desc="calibrate", unit="call", disable=not progress, dynamic_ncols=True,
            leave=batches.stop == run.batches,
        ) as bar,
    ):  # fmt: skip
        hooks.after_call = bar.update
        for i in batches:
            hooks.begin(i)
            if mixed:
                mixed.begin(i)
            run.run(i)
            if run.origin == "pipeline" and i == batches.start:
                if not hooks.calls:
                    raise never_called(loaded, settings)
                # samplers may call the model more often than once a step, and a text encoder once
                bar.initial = hooks.calls * batches.start
                bar.total, bar.n = hooks.calls * run.batches, bar.initial + hooks.calls
                bar.refresh()
    about = {
        "model": type(loaded.model).__name__,
        "origin": run.origin,
        "calls": hooks.calls,
        "guidance": settings.described_guidance,
        **{k: getattr(settings, k) for k in ("prompts", "samples", "steps", "seed")},
        **({"mixed_prompts": mixes} if mixes else {}),
    }
    return Statistics(hooks.stats, tuple(hooks.edges), about)


def _gradient_period(loaded: LoadedModel, settings: SamplingSettings, run: CalibrationRun) -> int:
    """Every how many calls gradients are collected: a text encoder's calls are few and short."""
    if is_text_encoder(loaded.model):
        return 1
    calls = run.batches * (settings.steps if run.origin == "pipeline" else 1)
    return max(1, calls // CALLS)


def observed_of(
    input_groups: Iterable[InputGroup], quantized: Collection[str], needs: frozenset[str]
) -> list[Observed]:
    """What to collect statistics of.

    Args:
        input_groups: of the model.
        quantized: names of the linears to quantize.
        needs: statistics to collect; with ``gradients``, parts of the outputs follow the inputs.
    """
    groups = [g for g in input_groups if any(x.name in quantized for x in g.linears)]
    linears = [x for g in groups for x in g.linears if x.name in quantized]
    wanted = linears if "gradients" in needs else []
    return [*groups, *(part for x in wanted for part in output_parts(x.name, x.shape[0]))]


def nbytes(each: Observed, bins: int, needs: frozenset[str]) -> int:
    """Bytes of the statistics of an input or a part of an output, see ``InputStats.nbytes``."""
    needs = OUTPUT_NEEDS if isinstance(each, OutputPart) else needs
    return InputStats.nbytes(each.columns, bins, needs)


def memory_batches(
    observed: Sequence[Observed], bins: int, needs: frozenset[str], memory: int
) -> list[list[Observed]]:
    """Split what is observed so that the statistics of each batch fit in memory.

    Args:
        observed: from :func:`observed_of`; the order is kept.
        bins: timestep bins.
        needs: statistics to collect.
        memory: bytes; a batch of one may take more.
    """
    batches: list[list[Observed]] = [[]]
    free = memory
    for each in observed:
        size = nbytes(each, bins, needs)
        if size > free and batches[-1]:
            batches.append([])
            free = memory
        batches[-1].append(each)
        free -= size
    return batches


def fill_from_sibling_experts(statistics: Statistics) -> Statistics:
    """Give experts that received no tokens the summed statistics of their siblings.

    All experts of a layer read the same stream. A group without siblings is left out.
    """
    # a fixed order, wherever the statistics are stored: it decides how sums round
    names = sorted(name for name in statistics.inputs if not is_part(name))
    unused = [name for name in names if not len(statistics.inputs[name].channels.amax())]
    if not unused:
        return statistics  # left where it is: on disk it may not fit in memory
    stats = dict(statistics.inputs)
    for name in unused:
        key = sibling_key(name)
        siblings = [n for n in names if n not in unused and sibling_key(n) == key != name]
        for sibling in siblings:
            stats[name].merge(stats[sibling])
        if not siblings:
            del stats[name]
        result = "takes the statistics of its siblings" if siblings else "is quantized without data"
        log.warning("calibrate: no token reached %s; it %s", name, result)
    return Statistics(stats, statistics.edges, statistics.about)
