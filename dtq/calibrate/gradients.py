# SPDX-License-Identifier: Apache-2.0
"""Gradients of the model's output with respect to the outputs of its linears.

How much an error of an output channel matters is in G, the second moment of that gradient, as in
K-FAC (1503.05671, section 3). The model is called again on the inputs of some calls, now with
gradients, and one random projection of its output is differentiated. The mean over such projections
is the second moment of the Jacobian.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtq.models import InputGroup
from dtq.models.linears import rows_of
from dtq.pipelines.recorded_calls import embedding, first_tensor

WIDEST = 2048
"""Output channels of a block of G; a linear with more of them has several blocks."""

CALLS = 40
"""Calls of a pipeline's model, or more, whose gradients are collected, if there are as many."""

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

    Args:
        model: the float model.
        parts: whose gradients to observe.
        text: whether the model is a text encoder, whose embeddings are its output.
    """

    def __init__(self, model: nn.Module, parts: Sequence[OutputPart], *, text: bool) -> None:
        self.model, self.text = model, text
        self.layers: Mapping[str, list[OutputPart]] = defaultdict(list)
        for part in parts:
            self.layers[part.layer].append(part)

    def collect(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seed: int,
        kept: Tensor | None,
        observe: Callable[[OutputPart, Tensor], None],
    ) -> None:
        """Run the model once more, forward and backward.

        A sample's part of the projection is scaled to the size of its output, so that all samples
        count the same and float16 holds the gradients.

        Args:
            args: of the call.
            kwargs: of the call.
            seed: of the random projection.
            kept: which tokens of the output (B * tokens,) count; None: all.
            observe: takes a part and the gradients of its channels, float (rows, columns).
        """
        with torch.enable_grad(), _frozen(self.model), _checkpointed(self.model), ExitStack() as on:
            for name in self.layers:
                hook = partial(self._watch, name, observe)
                on.enter_context(self.model.get_submodule(name).register_forward_hook(hook))
            # not the model itself: its hooks watch the calls of the pipeline
            output = self.model.forward(*args, **kwargs)
            out = embedding(output) if self.text else first_tensor(output)
            if not out.requires_grad:
                return  # no linear was reached
            generator = torch.Generator().manual_seed(seed)
            projection = torch.randn(out.shape, generator=generator).to(out.device)
            values = out.detach().float()
            axes = tuple(range(1, out.ndim))
            size = values.square().mean(axes, keepdim=True).sqrt() if axes else values.abs()
            projection /= size.clamp(min=1e-6)
            if kept is not None and out.ndim == 3 and len(kept) == out.shape[0] * out.shape[1]:
                projection *= kept.to(out.device).reshape(*out.shape[:2], 1)
            torch.autograd.backward([out], [projection.to(out.dtype)])

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
