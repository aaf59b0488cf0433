# SPDX-License-Identifier: Apache-2.0
"""Run the float model with hooks on its linears, and collect the statistics of their inputs."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dtq.calibrate.collection import Statistics
from dtq.calibrate.observers import InputStats, SampleOrigin
from dtq.errors import InputError
from dtq.models import InputGroup, is_text_encoder, sibling_key
from dtq.models.linears import input_of, rows_of
from dtq.models.timestep import timestep_edges, timestep_of
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

# call numbers reserved for each batch; a prime, because they seed the choice of sampled rows
_CALLS_PER_BATCH = 65537


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
    input_groups: Sequence[InputGroup],
    settings: SamplingSettings,
    needs: frozenset[str],
    *,
    inputs: Iterable[dict[str, Any]] | None = None,
    progress: bool = True,
) -> Statistics:
    """Run the float model in this process and collect statistics in memory, shard by shard.

    Args:
        loaded: the float model.
        input_groups: whose inputs to observe.
        settings: how a pipeline is sampled, the number of shards and of timestep bins.
        needs: statistics to collect, names of ``observers.OBSERVERS``.
        inputs: keyword arguments of the transformer's forward, one mapping per call.
        progress: show a bar with the time left.

    Raises:
        InputError: there is nothing to run the model on.
    """
    run = calibration_run(loaded, settings, None if inputs is None else list(inputs))
    collect = partial(collect_shard, loaded, input_groups, settings, needs, run, progress=progress)
    first, *others = shards = run.shards(settings.num_shards)
    total = collect(first)
    for batches in others:
        total.merge(collect(batches))
    total.about["num_shards"] = len(shards)
    return fill_from_sibling_experts(total)


def collect_shard(
    loaded: LoadedModel,
    input_groups: Sequence[InputGroup],
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
        input_groups: whose inputs to observe.
        settings: how a pipeline is sampled, and the number of timestep bins.
        needs: statistics to collect, names of ``observers.OBSERVERS``.
        run: from :func:`calibration_run`.
        batches: of the shard.
        progress: show a bar over all batches, those of other shards included.
    """
    hooks = CalibrationHooks(loaded, input_groups, settings.num_timestep_bins, needs, run.first)
    per_batch = settings.steps if run.origin == "pipeline" else 1
    with (
        hooks.attached(),
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
    }
    return Statistics(hooks.stats, tuple(hooks.edges), about)


def memory_batches(
    input_groups: Sequence[InputGroup], bins: int, needs: frozenset[str], memory: int
) -> list[list[InputGroup]]:
    """Split input groups so that the statistics of each batch fit in memory.

    Args:
        input_groups: in model order, which is kept.
        bins: timestep bins.
        needs: statistics to collect.
        memory: bytes; a batch of one group may take more.
    """
    batches: list[list[InputGroup]] = [[]]
    free = memory
    for group in input_groups:
        size = InputStats.nbytes(group.columns, bins, needs)
        if size > free and batches[-1]:
            batches.append([])
            free = memory
        batches[-1].append(group)
        free -= size
    return batches


def fill_from_sibling_experts(statistics: Statistics) -> Statistics:
    """Give experts that received no tokens the summed statistics of their siblings.

    All experts of a layer read the same stream. A group without siblings is left out.
    """
    # a fixed order, wherever the statistics are stored: it decides how sums round
    names = sorted(statistics.inputs)
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


class CalibrationHooks:
    """Forward hooks that pass the inputs of linears to their observers.

    A pipeline may run the layers of a text encoder and never its forward (Ideogram 4). There, a
    call begins when a linear is reached that the call before it has reached.

    Args:
        loaded: the float model.
        input_groups: whose inputs to observe.
        bins: timestep bins.
        needs: statistics to collect.
        first: timestep of the first call, None where the sampler decides.

    Attributes:
        stats: by name of the input group.
        edges: timesteps that separate the bins, from the first call on.
        calls: of the model so far.
        after_call: is called after every call of the model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        input_groups: Sequence[InputGroup],
        bins: int,
        needs: frozenset[str],
        first: float | None,
    ) -> None:
        self.model, self.input_groups, self.bins = loaded.model, input_groups, bins
        self.first = first
        self.stats = {g.name: InputStats(g.columns, bins, needs) for g in input_groups}
        self.edges: list[float] = []
        self.calls = 0
        self.after_call: Callable[[], object] = lambda: None
        self._top = loaded.family.largest_timestep if loaded.family else 0.0
        self._signature = inspect.signature(loaded.model.forward)
        self._call = self._bin = 0
        self._batch_size = 1
        self._inside = False  # of the model's forward
        self._reached: set[str] = set()  # outside of it, in the current call

    def begin(self, batch: int) -> None:
        """Number the calls of a batch, whichever process runs it and whatever ran before."""
        self._call = batch * _CALLS_PER_BATCH
        self._reached.clear()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks on the model, removed at the end."""
        with ExitStack() as hooks:
            hooks.enter_context(self.model.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.enter_context(self.model.register_forward_hook(self._leave))
            for group in self.input_groups:
                linear = self.model.get_submodule(group.linears[0].name)
                observe = partial(self._observe, group.name)
                hooks.enter_context(linear.register_forward_pre_hook(observe, with_kwargs=True))
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = True
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        first = next((v for v in bound.values() if isinstance(v, Tensor)), None)
        self._batch_size = first.shape[0] if first is not None and first.ndim else 1
        timestep = timestep_of(self.model, args, kwargs)
        if not self.edges and self.bins > 1:
            noisiest = timestep if self.first is None else self.first
            self.edges = timestep_edges(self._top, noisiest, self.bins)
        self._bin = sum(timestep > edge for edge in self.edges)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._inside = False
        self._count()

    def _count(self) -> None:
        self.calls += 1
        self._call += 1
        self.after_call()

    def _observe(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self._inside:
            if not self._reached or name in self._reached:
                self._reached.clear()
                self._count()
            self._reached.add(name)
        rows = rows_of(module, input_of(args, kwargs))
        halves = 2 if self._batch_size > 1 and len(rows) % 2 == 0 else 1
        branch = torch.arange(len(rows)) * halves // max(1, len(rows))
        self.stats[name].observe(rows, SampleOrigin(self._bin, self._call, branch.clamp(max=1)))
