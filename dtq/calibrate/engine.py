# SPDX-License-Identifier: Apache-2.0
"""Hooks on, run the denoising loop, hooks off: the float model runs once, everything is kept."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dtq.calibrate.collection import Statistics
from dtq.calibrate.observers import InputStats, SampleOrigin
from dtq.errors import InputError
from dtq.models import InputGroup, sibling_key
from dtq.models.linears import rows_of
from dtq.models.timestep import timestep_edges, timestep_of
from dtq.pipelines import image_inputs, prompts
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.sampling import dummy_batches, run_pipeline
from dtq.pipelines.settings import SamplingSettings

log = logging.getLogger("dtq")

_PLACES = 65537  # numbers for the calls of a batch; prime, for they decide which rows are sampled


@dataclass(frozen=True)
class CalibrationRun:
    """What the float model runs on, in batches that do not depend on who runs them.

    Attributes:
        origin: ``pipeline``, ``given`` or ``made up``.
        batches: how many there are.
        run: generates one batch, or calls the bare transformer once.
        first: timestep of the first call, None where the sampler decides.
    """

    origin: str
    batches: int
    run: Callable[[int], object]
    first: float | None = None

    def shards(self, wanted: int) -> list[range]:
        """The batches in at most ``wanted`` runs of nearly equal length."""
        count = min(wanted, self.batches)
        cuts = [i * self.batches // count for i in range(count + 1)]
        return [range(a, b) for a, b in itertools.pairwise(cuts)]


def calibration_run(
    loaded: LoadedModel,
    settings: SamplingSettings,
    inputs: Sequence[dict[str, Any]] | None = None,
) -> CalibrationRun:
    """How to run the float model.

    A pipeline runs its own sampler, both branches of guidance included. A bare transformer runs
    on ``inputs``, or on random latents and conditions made up for its family, with a warning.

    Args:
        source: the model.
        calibration: what to run.
        inputs: keyword arguments of the transformer's forward, one mapping a call.

    Raises:
        InputError: the model cannot be driven; says what would.
    """
    model, pipeline = loaded.model, loaded.pipeline
    if inputs is None and pipeline is not None:
        requests = prompts.load(settings.prompts, pipeline, settings.samples)
        batch = image_inputs.required(pipeline, settings).batch(settings.batch_size)
        batches = -(-len(requests.entries) // batch)

        def generate(i: int) -> object:
            return list(run_pipeline(pipeline, requests, settings, "latent", [i * batch]))

        return CalibrationRun("pipeline", batches, generate)
    origin = "given"
    if inputs is None:
        log.warning(
            "no pipeline and no inputs: calibrating %s on random latents and conditions. "
            "Activations of real pictures differ; give the pipeline when you have it.",
            type(model).__name__,
        )
        inputs, origin = list(dummy_batches(loaded, settings)), "made up"
    if not inputs:
        raise InputError("inputs is empty: nothing to calibrate on")
    calls = inputs
    first = timestep_of(model, (), calls[0])
    return CalibrationRun(origin, len(calls), lambda i: model(**calls[i]), first)


def calibrate(
    loaded: LoadedModel,
    input_groups: Sequence[InputGroup],
    settings: SamplingSettings,
    needs: frozenset[str],
    *,
    inputs: Iterable[dict[str, Any]] | None = None,
    progress: bool = True,
) -> Statistics:
    """Run the float model and collect statistics of every site's input, part by part.

    Args:
        source: the model.
        sites: whose inputs to watch.
        calibration: what to run.
        needs: statistics to keep, names of ``stats.STATS``.
        inputs: keyword arguments of the transformer's forward, one mapping a call.
        progress: show a bar with the time left.

    Raises:
        InputError: the model cannot be driven; says what would.
    """
    runs = calibration_run(loaded, settings, None if inputs is None else list(inputs))
    total: Statistics | None = None
    parts = runs.shards(settings.num_shards)
    for part in parts:
        seen = collect_shard(loaded, input_groups, settings, needs, runs, part, progress=progress)
        if total is None:
            total = seen
        else:
            total.merge(seen)
    assert total is not None
    total.about["num_shards"] = len(parts)
    return fill_from_sibling_experts(total)


def collect_shard(
    loaded: LoadedModel,
    input_groups: Sequence[InputGroup],
    settings: SamplingSettings,
    needs: frozenset[str],
    runs: CalibrationRun,
    part: range,
    *,
    progress: bool = True,
) -> Statistics:
    """The statistics of one part of the batches; parts are added up by ``Statistics.merge``.

    Args:
        source, sites, calibration, needs: as for :func:`calibrate`.
        runs: from :func:`drive`.
        part: which batches.
        progress: show a bar over all batches, those of other parts included.
    """
    watch = CalibrationHooks(loaded, input_groups, settings.num_timestep_bins, needs, runs.first)
    per_batch = settings.steps if runs.origin == "pipeline" else 1
    with (
        watch.hooks(),
        torch.no_grad(),
        tqdm(
            total=runs.batches * per_batch or None, initial=part.start * per_batch,
            desc="calibrate", unit="call", disable=not progress, dynamic_ncols=True,
            leave=part.stop == runs.batches,
        ) as bar,
    ):  # fmt: skip
        watch.tick = bar.update
        for i in part:
            watch.begin(i)
            runs.run(i)
            if runs.origin == "pipeline" and i == part.start:
                # samplers may call more often than they step
                bar.total, bar.n = watch.calls * runs.batches, watch.calls * (part.start + 1)
                bar.refresh()
    about = {
        "model": type(loaded.model).__name__,
        "origin": runs.origin,
        "calls": watch.calls,
        **{k: getattr(settings, k) for k in ("prompts", "samples", "steps", "guidance", "seed")},
    }
    return Statistics(watch.stats, tuple(watch.edges), about)


def memory_batches(
    input_groups: Sequence[InputGroup], bins: int, needs: frozenset[str], memory: int
) -> list[list[InputGroup]]:
    """The sites in runs whose statistics fit in ``memory`` bytes; a site alone always does."""
    found: list[list[InputGroup]] = [[]]
    free = memory
    for site in input_groups:
        size = InputStats.nbytes(site.columns, bins, needs)
        if size > free and found[-1]:
            found.append([])
            free = memory
        found[-1].append(site)
        free -= size
    return found


def fill_from_sibling_experts(statistics: Statistics) -> Statistics:
    """Sites that saw nothing take what their siblings saw: experts read the same stream."""
    names = sorted(
        statistics.inputs
    )  # one order, wherever they are kept: it decides how sums round
    idle = {name for name in names if not len(statistics.inputs[name].channels.amax())}
    if not idle:
        return statistics  # left where it is: on disk it may not fit in memory
    stats = dict(statistics.inputs)
    for name in sorted(idle):
        key = sibling_key(name)
        lenders = [n for n in names if n not in idle and sibling_key(n) == key != name]
        for lender in lenders:
            stats[name].merge(stats[lender])
        if not lenders:
            del stats[name]
        how = "takes the statistics of its siblings" if lenders else "is rounded without data"
        log.warning("calibrate: nothing reached %s; it %s", name, how)
    return Statistics(stats, statistics.edges, statistics.about)


class CalibrationHooks:
    """The hooks, and the statistics that they feed."""

    def __init__(
        self,
        loaded: LoadedModel,
        input_groups: Sequence[InputGroup],
        bins: int,
        needs: frozenset[str],
        first: float | None,
    ) -> None:
        self.model, self.sites, self.bins, self.first = loaded.model, input_groups, bins, first
        self.stats = {s.name: InputStats(s.columns, bins, needs) for s in input_groups}
        self.top = loaded.family.largest_timestep if loaded.family else 0.0
        self.edges: list[float] = []
        self.calls = 0
        self.place = 0
        self.bin = 0
        self.batch = 1
        self.tick: Callable[[], object] = lambda: None
        self._signature = inspect.signature(loaded.model.forward)

    def begin(self, batch: int) -> None:
        """Number the calls of a batch, whoever runs it, whatever ran before."""
        self.place = batch * _PLACES

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [self.model.register_forward_pre_hook(self._enter, with_kwargs=True)]
        handles.append(self.model.register_forward_hook(self._leave))
        for site in self.sites:
            linear = self.model.get_submodule(site.linears[0].name)
            handles.append(linear.register_forward_pre_hook(self._see(self.stats[site.name])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        first = next((v for v in bound.values() if isinstance(v, Tensor)), None)
        self.batch = first.shape[0] if first is not None and first.ndim else 1
        value = timestep_of(self.model, args, kwargs)
        if not self.edges and self.bins > 1:
            noisiest = value if self.first is None else self.first
            self.edges = timestep_edges(self.top, noisiest, self.bins)
        self.bin = sum(value > edge for edge in self.edges)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.calls += 1
        self.place += 1
        self.tick()

    def _see(self, stats: InputStats) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = rows_of(module, args[0])
            halves = 2 if self.batch > 1 and len(rows) % 2 == 0 else 1
            branch = torch.arange(len(rows)) * halves // max(1, len(rows))
            stats.observe(rows, SampleOrigin(self.bin, self.place, branch.clamp(max=1)))

        return hook
