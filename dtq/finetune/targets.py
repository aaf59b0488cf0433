# SPDX-License-Identifier: Apache-2.0
"""What a block learns from: its inputs in the quantized model, its outputs in the float one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtq.finetune.block_order import layers_of
from dtq.nn.step_clock import StepClock
from dtq.nn.swap import temporarily_replaced
from dtq.pipelines.recorded_calls import RecordedCall, call_module, copy_to_cpu

HELD_OUT = 8
"""One call in so many judges and is not trained on."""


@dataclass
class Example:
    """One call of a block: what it is given and what it should return, on the CPU.

    Attributes:
        want: the floating tensors of the float model's output.
        moment: bin and mode of the step clock, when there is one.
        clock: to be set to it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    want: list[Tensor]
    moment: tuple[Tensor, Tensor] | None = None
    clock: StepClock | None = None

    def loss(self, block: nn.Module) -> Tensor:
        """``sum |got - want|^2 / |want|^2`` over the outputs, float32 scalar."""
        device = next(block.parameters()).device
        if self.clock is not None and self.moment is not None:
            self.clock.bin.copy_(self.moment[0])
            self.clock.mode.copy_(self.moment[1])
        got = _tensors(call_module(block, self))
        total = torch.zeros((), device=device)
        for mine, theirs in zip(got, self.want, strict=True):
            target = theirs.to(device).float()
            miss = (mine.float() - target).square().sum()
            total = total + miss / target.square().sum().clamp(min=1e-30)
        return total


@torch.no_grad()
def error(block: nn.Module, examples: Sequence[Example]) -> float:
    """Mean loss over the examples."""
    return sum(float(example.loss(block)) for example in examples) / len(examples)


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Calls to train on and calls to judge by, these spread evenly; none of one call."""
    if len(examples) < 2:
        return examples, []
    count = max(1, len(examples) // HELD_OUT)
    held = {(2 * i + 1) * len(examples) // (2 * count) for i in range(count)}
    train = [example for i, example in enumerate(examples) if i not in held]
    return train, [examples[i] for i in sorted(held)]


class _Reached(Exception):
    """Ends a forward as soon as what was wanted of it is there."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def examples_of(
    model: nn.Module, name: str, floats: Mapping[str, nn.Linear], calls: Sequence[RecordedCall]
) -> list[Example]:
    """Inputs of the block in the quantized model, outputs of the same in the float one.

    Of a block that runs several times in a forward, the first time.
    """
    layers = layers_of(model, name).values()
    clock = next((layer.clock for layer in layers if layer.clock is not None), None)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        moment = None if clock is None else (clock.bin.clone(), clock.mode.clone())
        raise _Reached(Example(copy_to_cpu(args), copy_to_cpu(kwargs), [], moment, clock))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached([copy_to_cpu(t) for t in _tensors(output)])

    block = model.get_submodule(name)
    handle = block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        given = [_reach(model, call) for call in calls]
    finally:
        handle.remove()
    with temporarily_replaced(model, floats):
        handle = model.get_submodule(name).register_forward_hook(leave, prepend=True)
        try:
            wanted = [_reach(model, call) for call in calls]
        finally:
            handle.remove()
    examples = []
    for example, want in zip(given, wanted, strict=True):
        if example is not None and want is not None:
            example.want = want
            examples.append(example)
    return examples


@torch.no_grad()
def _reach(model: nn.Module, call: RecordedCall) -> Any:
    """Run a call until something is reached; None when nothing is."""
    try:
        call_module(model, call)
    except _Reached as reached:
        return reached.value
    return None


def _tensors(output: Any) -> list[Tensor]:
    """The floating tensors in a block's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for each in output for tensor in _tensors(each)]
    return []
