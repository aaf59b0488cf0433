# SPDX-License-Identifier: Apache-2.0
"""Hooks that show the observers what the linears of a float model read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtq.calibrate.gradients import ModelCall, Observed, OutputGradients, OutputPart
from dtq.calibrate.observers import OUTPUT_NEEDS, InputStats, SampleOrigin
from dtq.models import InputGroup, is_text_encoder
from dtq.models.linears import input_of, rows_of
from dtq.models.timestep import timestep_edges, timestep_of
from dtq.pipelines.loading import LoadedModel

# call numbers reserved for each batch; a prime, because they seed the choice of sampled rows
_CALLS_PER_BATCH = 65537


class CalibrationHooks:
    """Forward hooks that pass the inputs of linears to their observers.

    A pipeline may run the layers of a text encoder and never its forward (Ideogram 4). There, a
    call begins when a linear is reached that the call before it has reached. Of the rows of padding
    that the mask of a text encoder's call names, at most as many as real ones are observed: most
    pipelines do not read them, FLUX.2 does, and a short prompt has dozens of them.

    Args:
        loaded: the float model.
        observed: input groups, and parts of outputs whose gradients are observed.
        bins: timestep bins.
        needs: statistics to collect of inputs.
        first: timestep of the first call, None where the sampler decides.
        period: gradients are those of every such call; batches begin at different ones.

    Attributes:
        stats: by name of the input group or part.
        edges: timesteps that separate the bins, from the first call on.
        calls: of the model so far.
        after_call: is called after every call of the model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        observed: Sequence[Observed],
        bins: int,
        needs: frozenset[str],
        first: float | None,
        period: int = 1,
    ) -> None:
        self.model, self.bins, self.first, self.period = loaded.model, bins, first, period
        self.input_groups = [x for x in observed if isinstance(x, InputGroup)]
        parts = [x for x in observed if isinstance(x, OutputPart)]
        self.stats = {g.name: InputStats(g.columns, bins, needs) for g in self.input_groups}
        self.stats |= {x.name: InputStats(x.columns, bins, OUTPUT_NEEDS) for x in parts}
        self.edges: list[float] = []
        self.calls = 0
        self.after_call: Callable[[], object] = lambda: None
        self._top = loaded.family.largest_timestep if loaded.family else 0.0
        self._signature = inspect.signature(loaded.model.forward)
        self._call = self._bin = 0
        self._batch_size = 1
        self._inside = False  # of the model's forward
        self._reads_text = is_text_encoder(loaded.model)
        self._gradients = OutputGradients(loaded.model, parts, text=self._reads_text)
        self._rows = 0  # of the linear that reads the most in this call
        self._paused = False  # while the model is called for its gradients
        self._kept: Tensor | None = None  # whether a row of the call is observed
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
            hooks.enter_context(self.model.register_forward_hook(self._leave, with_kwargs=True))
            for name in self._gradients.layers:
                linear = self.model.get_submodule(name)
                count = self._count_rows
                hooks.enter_context(linear.register_forward_pre_hook(count, with_kwargs=True))
            for group in self.input_groups:
                linear = self.model.get_submodule(group.linears[0].name)
                observe = partial(self._observe, group.name)
                hooks.enter_context(linear.register_forward_pre_hook(observe, with_kwargs=True))
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside, self._rows = True, 0
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        first = next((v for v in bound.values() if isinstance(v, Tensor)), None)
        self._batch_size = first.shape[0] if first is not None and first.ndim else 1
        self._kept = _kept_rows(first, bound.get("attention_mask")) if self._reads_text else None
        timestep = timestep_of(self.model, args, kwargs)
        if not self.edges and self.bins > 1:
            noisiest = timestep if self.first is None else self.first
            self.edges = timestep_edges(self._top, noisiest, self.bins)
        self._bin = sum(timestep > edge for edge in self.edges)

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        cached = kwargs.get("past_key_values") is not None  # a second call would add to it
        turn = sum(divmod(self._call, _CALLS_PER_BATCH)) % self.period == 0
        if self._gradients.layers and turn and not cached:
            self._paused = True
            try:
                call = ModelCall(args, kwargs, output, self._batch_size, self._rows, self._kept)
                self._gradients.collect(call, self._call, self._observe_part)
            finally:
                self._paused = False
        self._inside, self._kept = False, None
        self._count()

    def _observe_part(self, part: OutputPart, gradients: Tensor) -> None:
        branch = torch.zeros(len(gradients), dtype=torch.int64)
        self.stats[part.name].observe(gradients, SampleOrigin(self._bin, self._call, branch))

    def _count(self) -> None:
        self.calls += 1
        self._call += 1
        self.after_call()

    def _count_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rows = max(self._rows, len(rows_of(module, input_of(args, kwargs))))

    def _observe(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._paused:
            return
        if not self._inside:
            if not self._reached or name in self._reached:
                self._reached.clear()
                self._count()
            self._reached.add(name)
        rows = rows_of(module, input_of(args, kwargs))
        halves = 2 if self._batch_size > 1 and len(rows) % 2 == 0 else 1
        branch = torch.arange(len(rows)) * halves // max(1, len(rows))
        branch = branch.clamp(max=1)
        if self._kept is not None and len(self._kept) == len(rows):
            rows, branch = rows[self._kept.to(rows.device)], branch[self._kept]
        self.stats[name].observe(rows, SampleOrigin(self._bin, self._call, branch))


def _kept_rows(ids: Tensor | None, mask: object) -> Tensor | None:
    """Which of the tokens (B * tokens,) are observed; None: all.

    Every token that is no padding, and at most as many of padding, evenly spaced.
    """
    if ids is None or not isinstance(mask, Tensor) or mask.shape != ids.shape or not mask.any():
        return None
    real = mask.flatten().cpu() != 0
    padding, count = (~real).nonzero().flatten(), int(real.sum())
    if len(padding) > count:
        padding = padding[torch.arange(count) * len(padding) // count]
    return real.index_fill(0, padding, True)
