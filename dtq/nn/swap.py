# SPDX-License-Identifier: Apache-2.0
"""Put quantized linears where float ones were, and the clock that static scales read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import CheckpointError
from dtq.families import TIME_ARGUMENTS
from dtq.nn import alarm
from dtq.nn.activation import quicken
from dtq.nn.linear import CHANGE, QuantLinear, StepClock, aligned, is_linear
from dtq.plan import LoadPlan
from dtq.policy import StepPolicy

_CLOCK = "_dtq_clock"


def swap_empty(model: nn.Module, plan: LoadPlan, compute_dtype: torch.dtype) -> None:
    """Replace every planned linear by an empty quantized one on the same device.

    Raises:
        CheckpointError: the plan names a module that is not a linear of this model.
    """
    for name, old in planned_linears(model, plan).items():
        layer = plan.layers[name]
        device = next(old.parameters()).device
        new = QuantLinear.in_place_of(
            old, layer, bins=plan.bins, compute_dtype=compute_dtype, device=device
        )
        model.set_submodule(name, new)
    finish(model, plan.edges, plan.policy)


def planned_linears(model: nn.Module, plan: LoadPlan) -> dict[str, nn.Module]:
    """The linears that a plan names.

    Raises:
        CheckpointError: the plan names a module that is not a linear of this model.
    """
    found = {}
    for name in plan.layers:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"config.json: the model has no layer {name!r}") from error
        if not is_linear(module):
            kind = type(module).__name__
            raise CheckpointError(f"config.json: {name!r} is a {kind}, not a linear")
        found[name] = module
    return found


@contextmanager
def placed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules in place of some, by dotted name, on the device of those they replace.

    The model is as before afterwards, also on errors, and the others are back where they were.
    """
    before = {name: model.get_submodule(name) for name in modules}
    homes = {name: _device(module) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module.to(_device(before[name])))
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
        for name, module in modules.items():
            module.to(homes[name])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters(), torch.empty(0)).device


def finish(
    model: nn.Module,
    edges: tuple[float, ...],
    policy: StepPolicy | None = None,
    *,
    align: bool = True,
) -> None:
    """What a model with quantized linears needs besides them: guards, alignment, clock, GELU.

    Without ``align`` mapped tensors stay in their files: for a model that is saved and never run.
    """
    for module in model.modules():
        if any(isinstance(child, QuantLinear) for child in module.children()) and hasattr(
            module, "fuse_projections"
        ):
            # diffusers would concatenate the codes of q, k and v as if they were weights
            module._supports_qkv_fusion = False  # type: ignore[assignment]
    quantized = [n for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    others = getattr(type(model), "_skip_layerwise_casting_patterns", None) or ()
    # scales cannot be cast, but biases can, and nothing is gained by that
    pattern = f"^({'|'.join(map(re.escape, quantized))})$"
    model._skip_layerwise_casting_patterns = [*others, pattern]  # type: ignore[assignment]
    for tensor in (*model.parameters(), *model.buffers()) if align else ():
        tensor.data = aligned(tensor.data)
    quicken(model)
    if edges or policy is not None:
        install_clock(model, edges, policy)
    if alarm.wanted():
        alarm.arm(model)


def share_changes(model: nn.Module) -> None:
    """Let layers of a block that change their input alike, as q, k and v do, follow the first."""
    firsts: dict[tuple[object, ...], list[QuantLinear]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLinear) or not any(n in layer.specs() for n in CHANGE):
            continue
        layer.follow(None)
        block = re.match(r".*?\.\d+(?=\.)", name)
        key = block and block[0], layer.in_features, layer.task.block, layer.task.turns, layer.acts
        known = firsts.setdefault(key, [])
        first = next((other for other in known if _change_alike(layer, other)), None)
        if first is None:
            known.append(layer)
        else:
            layer.follow(first)


def _change_alike(a: QuantLinear, b: QuantLinear) -> bool:
    for name in CHANGE:
        if (name in a.specs()) != (name in b.specs()):
            return False
        if name in a.specs():
            x, y = a.part(name), b.part(name)
            if x.is_meta or x.device != y.device or not torch.equal(x, y):
                return False
    return True


def install_clock(
    model: nn.Module, edges: tuple[float, ...], policy: StepPolicy | None = None
) -> StepClock:
    """Give the model a clock set from its timestep argument, and show it to every layer."""
    clock = StepClock(edges, policy).to(_device(model))
    if not hasattr(model, _CLOCK):
        model.register_forward_pre_hook(_tell_time, with_kwargs=True)
    model.add_module(_CLOCK, clock)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.hear(clock)
    return clock


def _tell_time(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
