# SPDX-License-Identifier: Apache-2.0
"""Put quantized linears where float ones were, and the clock that static scales read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from dtq.errors import CheckpointError
from dtq.models.linears import is_linear
from dtq.nn import nan_check
from dtq.nn.gelu import use_fast_gelu
from dtq.nn.linear import QuantLinear
from dtq.nn.storage import _device, aligned
from dtq.nn.timestep_hook import install_clock
from dtq.plan.layers import CheckpointSpec
from dtq.plan.step_policy import StepPolicy


def swap_empty(model: nn.Module, plan: CheckpointSpec, compute_dtype: torch.dtype) -> None:
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
    finalize(model, plan.edges, plan.policy)


def planned_linears(model: nn.Module, plan: CheckpointSpec) -> dict[str, nn.Module]:
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
def temporarily_replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
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


def finalize(
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
    use_fast_gelu(model)
    if edges or policy is not None:
        install_clock(model, edges, policy)
    if nan_check.requested():
        nan_check.enable(model)
