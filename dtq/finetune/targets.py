# SPDX-License-Identifier: Apache-2.0
"""Training examples of a block: its inputs in the quantized model, its outputs in the float one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from dtq.finetune.block_order import layers_of
from dtq.nn.step_clock import StepClock
from dtq.nn.swap import temporarily_replaced
from dtq.pipelines.recorded_calls import RecordedCall, call_module, copy_to_cpu

HELD_OUT = 8
"""One call in so many is held out of the training, to compare the result on."""


@dataclass
class Example:
    """One call of a block, on the CPU.

    Attributes:
        args, kwargs: of the block's forward, in the quantized model.
        targets: the floating tensors that the float model's block returns.
        clock_state: timestep bin and precision of the step clock, when there is one.
        clock: the step clock, set to that state before the block runs.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor]
    clock_state: tuple[Tensor, Tensor] | None = None
    clock: StepClock | None = None

    def loss(self, block: nn.Module) -> Tensor:
        """``sum |output - target|^2 / |target|^2`` over the outputs, float32 scalar."""
        device = next(block.parameters()).device
        if self.clock is not None and self.clock_state is not None:
            self.clock.bin.copy_(self.clock_state[0])
            self.clock.mode.copy_(self.clock_state[1])
            self.clock.samples = None
        outputs = _tensors(call_module(block, self))
        total = torch.zeros((), device=device)
        for output, target in zip(outputs, self.targets, strict=True):
            target = target.to(device).float()
            error = (output.float() - target).square().sum()
            total = total + error / target.square().sum().clamp(min=1e-30)
        return total


@torch.no_grad()
def error(block: nn.Module, examples: Sequence[Example]) -> float:
    """Mean loss over the examples."""
    return sum(float(example.loss(block)) for example in examples) / len(examples)


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and held-out ones, spread evenly; a single one is not held out."""
    if len(examples) < 2:
        return examples, []
    count = max(1, len(examples) // HELD_OUT)
    held = {(2 * i + 1) * len(examples) // (2 * count) for i in range(count)}
    train = [example for i, example in enumerate(examples) if i not in held]
    return train, [examples[i] for i in sorted(held)]


class _Captured(Exception):
    """Ends a forward as soon as a block's input or output is there; its only argument."""


def examples_of(
    model: nn.Module, name: str, floats: Mapping[str, nn.Linear], calls: Sequence[RecordedCall]
) -> list[Example]:
    """Examples of a block, one for each call that runs it.

    Of a block that runs several times in a forward, the first time.

    Args:
        model: with quantized linears in place.
        name: of the block.
        floats: the float linears that they replaced, by dotted name.
        calls: recorded calls of the float model.
    """
    layers = layers_of(model, name).values()
    clock = next((layer.clock for layer in layers if layer.clock is not None), None)

    def capture_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        state = None if clock is None else (clock.bin.clone(), clock.mode.clone())
        raise _Captured(Example(copy_to_cpu(args), copy_to_cpu(kwargs), [], state, clock))

    def capture_output(module: nn.Module, args: Any, output: Any) -> None:
        raise _Captured([copy_to_cpu(t) for t in _tensors(output)])

    block = model.get_submodule(name)
    with block.register_forward_pre_hook(capture_input, with_kwargs=True, prepend=True):
        inputs = [_capture(model, call) for call in calls]
    with (
        temporarily_replaced(model, floats),
        model.get_submodule(name).register_forward_hook(capture_output, prepend=True),
    ):
        outputs = [_capture(model, call) for call in calls]
    return [
        replace(example, targets=targets)
        for example, targets in zip(inputs, outputs, strict=True)
        if example is not None and targets is not None
    ]


@torch.no_grad()
def _capture(model: nn.Module, call: RecordedCall) -> Any:
    """Run a call until a hook captures something; None when none does."""
    try:
        call_module(model, call)
    except _Captured as captured:
        return captured.args[0]
    return None


def _tensors(output: Any) -> list[Tensor]:
    """The floating tensors in a block's output, in order."""
    return [t for t in tree_iter(output) if isinstance(t, Tensor) and t.is_floating_point()]
