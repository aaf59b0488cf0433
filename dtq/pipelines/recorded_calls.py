# SPDX-License-Identifier: Apache-2.0
"""A recorded call of the float model: what it was given, what it gave, and playing it again."""

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
    """One call of the transformer, on the CPU.

    Attributes:
        step: position in its sampling run.
        args, kwargs: of its forward.
        output: its first output.
        timestep: that it was called with, 0 if it takes none.
        model: name in its pipeline of the transformer that was called.
    """

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    timestep: float = 0.0
    model: str = "transformer"

    @property
    def latents(self) -> Tensor:
        """The first tensor that it was given, or a list of tensors as one."""
        return first_tensor((*self.args, *self.kwargs.values()))


@torch.no_grad()
def replay(model: nn.Module, call: RecordedCall) -> Tensor:
    """The model's first output on a recorded call, on the CPU."""
    return first_tensor(called(model, call)).cpu()


def called(module: nn.Module, call: Any) -> Any:
    """What a module returns to the ``args`` and ``kwargs`` of a call, on the module's device."""
    device = next(module.parameters()).device
    return module(*send_to_device(call.args, device), **send_to_device(call.kwargs, device))


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a diffusers transformer returns.

    The first entry of an output class or tuple; the pictures of a list as one tensor.

    Raises:
        InputError: there is no tensor in it.
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
        f"a model that returns {type(output).__name__} without a tensor is no denoiser"
    )


def copied(value: Any) -> Any:
    """Every tensor in nested tuples, lists and mappings, copied to the CPU."""
    return recursively_apply(lambda t: t.detach().cpu().clone(), value)


def by_timestep(calls: Sequence[RecordedCall]) -> list[list[RecordedCall]]:
    """Calls one by one, but two in a row with the same latents together.

    Such are the two branches of guidance where the sampler does not batch them.
    """
    found: list[list[RecordedCall]] = []
    for call in calls:
        last = found[-1] if found else []
        if len(last) == 1 and torch.equal(last[0].latents, call.latents):
            last.append(call)
        else:
            found.append([call])
    return found


def subsample(calls: Sequence[RecordedCall], count: int) -> list[RecordedCall]:
    """At most ``count`` of the calls, evenly over the trajectory, branches of guidance together."""
    pairs = by_timestep(calls)
    size = max(map(len, pairs), default=1)
    wanted = max(1, min(len(pairs), count // size))
    picked = [pairs[(2 * i + 1) * len(pairs) // (2 * wanted)] for i in range(wanted)]
    return [call for pair in picked for call in pair]


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want|^2 / |want|^2`` in float64; infinite when ``got`` is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    difference = got.double() - want.double()
    return float(difference.square().sum() / want.double().square().sum().clamp(min=1e-300))
