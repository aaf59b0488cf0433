# SPDX-License-Identifier: Apache-2.0
"""A recorded call of the float model: its inputs and its output. It can be replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn

from dtq.errors import InputError


@dataclass
class RecordedCall:
    """One call of the transformer; tensors are on the CPU.

    Attributes:
        step: index of the call in its sampling run.
        args: positional arguments of the forward.
        kwargs: keyword arguments of the forward.
        output: its first output.
        timestep: of the call; 0 if the model takes none.
        model: name of the called transformer in its pipeline.
    """

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    timestep: float = 0.0
    model: str = "transformer"

    @property
    def latents(self) -> Tensor:
        """The first tensor of the inputs; a list of tensors is stacked."""
        return first_tensor((*self.args, *self.kwargs.values()))


@torch.no_grad()
def replay(model: nn.Module, call: RecordedCall) -> Tensor:
    """The model's first output for a recorded call, on the CPU."""
    return first_tensor(call_module(model, call)).cpu()


def call_module(module: nn.Module, call: Any) -> Any:
    """Call a module with ``call.args`` and ``call.kwargs``, moved to the module's device."""
    device = next(module.parameters()).device
    return module(*send_to_device(call.args, device), **send_to_device(call.kwargs, device))


def first_tensor(output: Any) -> Tensor:
    """The prediction in the output of a diffusers transformer.

    It is the first entry of an output class or tuple; a list of tensors, one per image, becomes one
    tensor.

    Raises:
        InputError: the output has no tensor.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list) and output and all(isinstance(t, Tensor) for t in output):
        same = all(t.shape == output[0].shape for t in output)
        return torch.stack(output) if same else torch.cat([t.flatten() for t in output])
    entries = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(entries, list | tuple):
        for entry in entries:
            if isinstance(entry, Tensor) or (isinstance(entry, Mapping | list | tuple) and entry):
                return first_tensor(entry)
    raise InputError(
        f"the model returned {type(output).__name__} without a tensor; it must return a tensor, or "
        f"an output that holds one"
    )


def embedding(output: Any) -> Tensor:
    """What a text encoder gives to the denoiser: its last hidden state.

    A model with a head gives it among ``hidden_states``, if the pipeline asks for these; without
    either it is the first tensor.
    """
    if isinstance(output, Mapping):
        if output.get("last_hidden_state") is not None:
            return first_tensor(output["last_hidden_state"])
        if output.get("hidden_states"):
            return first_tensor(output["hidden_states"][-1])
    return first_tensor(output)


def copy_to_cpu(value: Any) -> Any:
    """A copy with every tensor in nested tuples, lists and mappings on the CPU."""
    return recursively_apply(lambda t: t.detach().cpu().clone(), value)


def by_timestep(calls: Sequence[RecordedCall]) -> list[list[RecordedCall]]:
    """Group consecutive calls with the same latents, at most two per group.

    Two such calls are the branches of guidance, in a sampler that does not batch them.
    """
    groups: list[list[RecordedCall]] = []
    for call in calls:
        last = groups[-1] if groups else []
        if len(last) == 1 and torch.equal(last[0].latents, call.latents):
            last.append(call)
        else:
            groups.append([call])
    return groups


def subsample(calls: Sequence[RecordedCall], count: int) -> list[RecordedCall]:
    """At most ``count`` of the calls, spread evenly over the trajectory.

    The branches of guidance of one timestep stay together.
    """
    groups = by_timestep(calls)
    size = max(map(len, groups), default=1)
    number = max(1, min(len(groups), count // size))
    picked = [groups[(2 * i + 1) * len(groups) // (2 * number)] for i in range(number)]
    return [call for group in picked for call in group]
