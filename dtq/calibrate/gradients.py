# SPDX-License-Identifier: Apache-2.0
"""Gradients of the model's output with respect to the outputs of its linears.

How much an error of an output channel matters is in G, the second moment of that gradient, as in
K-FAC (1503.05671, section 3). The model is called again on the inputs of some calls, now with
gradients, and one random projection of its output is differentiated. The mean over such projections
is the second moment of the Jacobian.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dtq.linalg.relative_error import relative_error
from dtq.models import InputGroup
from dtq.models.linears import rows_of
from dtq.pipelines.recorded_calls import embedding, first_tensor

log = logging.getLogger("dtq")

WIDEST = 2048
"""Output channels of a block of G; a linear with more of them has several blocks."""

CALLS = 40
"""Calls of a pipeline's model, or more, whose gradients are collected, if there are as many."""

PART_ROWS = 1024
"""Rows of a part of a batch that is run with gradients, padding included."""

ROWS = 512
"""Rows of gradients after which a call is left."""

TEXT_PROJECTIONS = 4
"""Random projections of an output of a text encoder, whose calls have few rows."""

ALIKE = 1e-3
"""Relative squared error up to which samples that run apart from their batch are the same."""

CHECKPOINTED = 1_000_000_000
"""Parameters from which a model computes its activations again in the backward pass."""


@dataclass(frozen=True)
class OutputPart:
    """Every ``count``-th output channel of a linear, whose gradients are observed together.

    Attributes:
        layer: dotted path of the linear.
        outputs: N, its output channels.
        index: of the first channel.
        count: of the parts of this linear.
    """

    layer: str
    outputs: int
    index: int
    count: int

    @property
    def name(self) -> str:
        """Of its statistics; that of no input group, because dotted paths have no colon."""
        return f"{self.layer}:{self.index}"

    @property
    def columns(self) -> int:
        """Channels of the part."""
        return len(range(self.index, self.outputs, self.count))


@dataclass(frozen=True)
class ModelCall:
    """A call of a model in its pipeline.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        output: what the model returned.
        batch: B, the first axis of the first tensor.
        rows: of the linear that reads the most of them.
        kept: which tokens of the output (B * tokens,) count; None: all.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    batch: int
    rows: int
    kept: Tensor | None

    def in_parts(self, seed: int) -> list[Tensor]:
        """Indices of the samples of each part, neighbors far apart; [] if there is one part."""
        per_sample = self.rows / self.batch
        count = math.ceil(self.batch / max(1, PART_ROWS // max(1, per_sample)))
        first = seed % self.batch
        order = torch.arange(first, first + self.batch) % self.batch
        return [order[i::count] for i in range(count)] if count > 1 else []

    def rows_of(self, samples: Tensor) -> int:
        """Rows that count of some samples."""
        if self.kept is None:
            return self.rows * len(samples) // self.batch
        return int(self.kept.reshape(self.batch, -1)[samples].sum())


def _select(value: Any, samples: Tensor, batch: int) -> Any:
    """Some samples of tensors whose first axis is the batch, and of lists of as many tensors."""
    if isinstance(value, Tensor):
        return value[samples.to(value.device)] if value.ndim and len(value) == batch else value
    if isinstance(value, list) and len(value) == batch and isinstance(value[0], Tensor):
        return [value[i] for i in samples.tolist()]
    if type(value) is dict:
        return {k: _select(v, samples, batch) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_select(v, samples, batch) for v in value)
    return value


Observed = InputGroup | OutputPart
"""What statistics are of: the input of some linears, or a part of the output of one."""


def is_part(name: str) -> bool:
    """Whether statistics of this name are of a part of an output."""
    return ":" in name


def output_parts(layer: str, outputs: int) -> list[OutputPart]:
    """The parts of the N outputs of a linear: nearly equal, none wider than ``WIDEST``."""
    count = -(-outputs // WIDEST)
    return [OutputPart(layer, outputs, i, count) for i in range(count)]


class OutputGradients:
    """Runs a model again with gradients, and passes those of its linears on.

    A few samples of a call have rows enough, and their activations take a fraction of the memory.
    So a call is run in small parts of its batch, until :data:`ROWS` have been observed, as long as
    a part gives the outputs that the whole call gave; otherwise it is run as a whole.

    Args:
        model: the float model.
        parts: whose gradients to observe.
        text: whether the model is a text encoder, whose embeddings are its output.
    """

    def __init__(self, model: nn.Module, parts: Sequence[OutputPart], *, text: bool) -> None:
        self.model, self.text = model, text
        self.projections = TEXT_PROJECTIONS if text else 1
        self.layers: Mapping[str, list[OutputPart]] = defaultdict(list)
        for part in parts:
            self.layers[part.layer].append(part)
        self._divisible = True

    def collect(
        self, call: ModelCall, seed: int, observe: Callable[[OutputPart, Tensor], None]
    ) -> None:
        """Run the model once more, forward and backward.

        A model that cannot be differentiated where it is has no gradients, and a warning says so.

        Args:
            call: what the pipeline has called the model with.
            seed: of the random projections, and of the choice of samples.
            observe: takes a part and the gradients of its channels, float (rows, columns).
        """
        try:
            self._collect(call, seed, observe)
        except NotImplementedError as error:
            self._leave_out(str(error))

    def _leave_out(self, reason: str) -> None:
        self.layers = {}
        _warn(type(self.model).__name__, reason)

    def _collect(
        self, call: ModelCall, seed: int, observe: Callable[[OutputPart, Tensor], None]
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad(), _frozen(self.model), _checkpointed(self.model), ExitStack() as on:
            for name in self.layers:
                hook = partial(self._watch, name, observe)
                on.enter_context(self.model.get_submodule(name).register_forward_hook(hook))
            seen, samples = 0, call.in_parts(seed) if self._divisible else []
            for part in samples:
                if not self._run_part(call, part, generator):
                    log.info("calibrate: %s runs whole batches", type(self.model).__name__)
                    self._divisible = False
                    break
                seen += call.rows_of(part)
                if seen >= ROWS:
                    return
            if not samples or not seen:
                self._backward(self._forward(call.args, call.kwargs), call.kept, generator)

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        # not the model itself: its hooks watch the calls of the pipeline
        output = self.model.forward(*args, **kwargs)
        return embedding(output) if self.text else first_tensor(output)

    def _run_part(self, call: ModelCall, samples: Tensor, generator: torch.Generator) -> bool:
        """Run some samples; False if they cannot be run apart from the others."""
        args, kwargs = (_select(x, samples, call.batch) for x in (call.args, call.kwargs))
        try:
            out = self._forward(args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            log.info("calibrate: a part of a batch: %s", error)
            return False
        want = (embedding if self.text else first_tensor)(call.output)
        want = _select(want, samples, call.batch)
        if out.shape != want.shape or relative_error(out.detach(), want) > ALIKE:
            return False
        kept = call.kept
        if kept is not None:
            kept = kept.reshape(call.batch, -1)[samples].flatten()
        self._backward(out, kept, generator)
        return True

    def _backward(self, out: Tensor, kept: Tensor | None, generator: torch.Generator) -> None:
        """Differentiate random projections of an output.

        A sample's part of a projection is scaled to the size of its output, so that all samples
        count the same and float16 holds the gradients.
        """
        if not out.requires_grad:
            return  # no linear was reached
        axes, values = tuple(range(1, out.ndim)), out.detach().float()
        size = values.square().mean(axes, keepdim=True).sqrt() if axes else values.abs()
        weight = 1 / size.clamp(min=1e-6)
        if kept is not None and out.ndim == 3 and len(kept) == out.shape[0] * out.shape[1]:
            weight = weight * kept.to(out.device).reshape(*out.shape[:2], 1)
        for last in reversed(range(self.projections)):
            projection = torch.randn(out.shape, generator=generator).to(out.device) * weight
            torch.autograd.backward([out], [projection.to(out.dtype)], retain_graph=last > 0)

    def _watch(
        self,
        name: str,
        observe: Callable[[OutputPart, Tensor], None],
        module: nn.Module,
        args: tuple[Any, ...],
        output: Tensor,
    ) -> Tensor | None:
        def backward(gradient: Tensor) -> None:
            rows = rows_of(module, gradient.detach())
            rows = rows[rows.isfinite().all(1)]  # float16 may overflow
            for part in self.layers[name]:
                observe(part, rows[:, part.index :: part.count])

        if not torch.is_grad_enabled():
            return None
        if output.requires_grad:
            output.register_hook(backward)
            return None
        # the first linear of a path: what it reads has no gradient
        output.requires_grad_().register_hook(backward)
        return output.clone()  # a leaf must not be changed in place


@cache
def _warn(name: str, reason: str) -> None:
    """Warn once: every shard of a calibration finds it out."""
    log.warning("calibrate: no gradients of %s, solver yaqa becomes gptq: %s", name, reason)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters: they take as much memory as the model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Activations of blocks are computed again in the backward pass of a large model."""
    able = getattr(model, "_supports_gradient_checkpointing", False)  # of diffusers
    large = sum(p.numel() for p in model.parameters()) >= CHECKPOINTED
    if not (able and large) or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()  # type: ignore[operator]
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()  # type: ignore[operator]
