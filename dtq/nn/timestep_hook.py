# SPDX-License-Identifier: Apache-2.0
"""A hook that sets the step clock from the timestep argument of every call of the model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from dtq.models import TIME_ARGUMENTS
from dtq.nn.linear import QuantLinear
from dtq.nn.step_clock import StepClock
from dtq.nn.storage import device_of
from dtq.plan.step_policy import StepPolicy

_CLOCK = "_dtq_clock"


def install_clock(
    model: nn.Module, edges: tuple[float, ...], policy: StepPolicy | None = None
) -> StepClock:
    """Add a step clock to a model and its quantized layers; replaces an earlier clock.

    Args:
        model: a transformer with quantized layers.
        edges: inner edges of the timestep bins of static activation scales.
        policy: the step policy, if there is one.
    """
    clock = StepClock(edges, policy).to(device_of(model))
    if not hasattr(model, _CLOCK):
        model.register_forward_pre_hook(_set_clock, with_kwargs=True)
    model.add_module(_CLOCK, clock)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.set_clock(clock)
    return clock


def remove_clock(model: nn.Module) -> None:
    """Remove the step clock of a model, if there is one; no layer may need it any more."""
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _set_clock]:
        del hooks[key], model._forward_pre_hooks_with_kwargs[key]
        delattr(model, _CLOCK)


def _set_clock(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    clock = getattr(module, _CLOCK)
    for name in TIME_ARGUMENTS:
        if isinstance(kwargs.get(name), Tensor):
            clock.set(kwargs[name])
            return
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    for name, value in zip(names, args, strict=False):
        if name in TIME_ARGUMENTS and isinstance(value, Tensor):
            clock.set(value)
            return
    raise ValueError("static activation scales need the timestep as a tensor argument")
