# SPDX-License-Identifier: Apache-2.0
"""A hook that sets the step clock from the timestep argument of every call of the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dtq.errors import InputError
from dtq.models import find_family, scan_names
from dtq.models.timestep import timestep_argument
from dtq.nn.linear import QuantLinear
from dtq.nn.step_clock import StepClock
from dtq.nn.storage import device_of
from dtq.plan.step_policy import StepPolicy

_CLOCK = "_dtq_clock"
_OF_TOKENS = ("attn.", "xattn.", "ffn.")
"""Starts of the roles whose layers read tokens; modulation reads one row per sample."""


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
        model.register_forward_hook(_forget_samples, always_call=True)
    model.add_module(_CLOCK, clock)
    roles = scan_names(model, find_family(model)).linears()
    clock.token_layers = frozenset(x.name for x in roles if x.role.startswith(_OF_TOKENS))
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module.set_clock(clock, name)
    return clock


def remove_clock(model: nn.Module) -> None:
    """Remove the step clock of a model, if there is one; no layer may need it any more."""
    for hooks, flags, ours in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, _set_clock),
        (model._forward_hooks, model._forward_hooks_always_called, _forget_samples),
    ):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key], flags[key]
    if hasattr(model, _CLOCK):
        delattr(model, _CLOCK)


def _set_clock(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    timestep = timestep_argument(module, args, kwargs)
    if not isinstance(timestep, Tensor):
        raise InputError(
            "static activation scales and step policies need the timestep as a tensor: pass it to "
            "the model"
        )
    getattr(module, _CLOCK).set(timestep)


def _forget_samples(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
    getattr(module, _CLOCK).samples = None  # blocks may be called without the model
