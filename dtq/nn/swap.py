# SPDX-License-Identifier: Apache-2.0
"""Replace float linears of a model by quantized ones, and prepare the model to run."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from dtq.errors import CheckpointError
from dtq.models.linears import is_convolution, is_linear
from dtq.models.tables import is_table, tie_problem
from dtq.nn import nan_check
from dtq.nn.attention import use_int8_attention
from dtq.nn.conv import QuantConv
from dtq.nn.embedding import (
    QuantEmbedding,
    forget_packed_ties,
    put_table,
    refuse_resizing,
    row_misfit,
)
from dtq.nn.gelu import use_fast_gelu
from dtq.nn.linear import QuantLinear
from dtq.nn.storage import aligned, device_of
from dtq.nn.timestep_hook import install_clock, remove_clock
from dtq.nn.weight_only import WeightOnly
from dtq.plan.layers import CheckpointSpec, LayerSpec
from dtq.plan.step_policy import StepPolicy

log = logging.getLogger("dtq")


def swap_empty(model: nn.Module, plan: CheckpointSpec, compute_dtype: torch.dtype) -> None:
    """Replace every planned module by an uninitialized quantized one on the same device.

    Raises:
        CheckpointError: see :func:`planned_linears`.
    """
    for name, old in planned_linears(model, plan).items():
        device = next(old.parameters()).device
        spec = plan.layers[name]
        new: nn.Module
        if isinstance(old, nn.Embedding):
            table = QuantEmbedding.in_place_of(
                old, spec, compute_dtype=compute_dtype, device=device
            )
            put_table(model, name, table)
            continue
        if is_linear(old):
            new = QuantLinear.in_place_of(
                old, spec, bins=plan.bins, compute_dtype=compute_dtype, device=device
            )
        else:
            new = QuantConv.in_place_of(old, spec, compute_dtype=compute_dtype, device=device)
        model.set_submodule(name, new)
    finalize(model, plan.edges, plan.policy)


def planned_linears(model: nn.Module, plan: CheckpointSpec) -> dict[str, nn.Module]:
    """The linears, convolutions and tables that a plan names, by name.

    Raises:
        CheckpointError: the plan names a module that is none of these, or a table that cannot be
            packed.
    """
    linears = {}
    for name, spec in plan.layers.items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"config.json: the model has no layer {name!r}") from error
        weights_only = spec == LayerSpec(spec.weight_format, "none")
        if weights_only and is_table(module):
            if problem := tie_problem(model, name) or row_misfit(spec.weight_format):
                raise CheckpointError(f"config.json: {name!r} cannot be packed: {problem}")
        elif not is_linear(module) and not (is_convolution(module) and weights_only):
            kind = type(module).__name__
            raise CheckpointError(f"config.json: {name!r} is a {kind}, not a linear")
        linears[name] = module
    return linears


@contextmanager
def temporarily_replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace modules of a model, on the devices of the replaced ones; undone at the end.

    Args:
        model: the transformer.
        modules: replacements by dotted name; they too return to their own devices at the end.
    """
    before = {name: model.get_submodule(name) for name in modules}
    devices = {name: device_of(module) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module.to(device_of(before[name])))
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
        for name, module in modules.items():
            module.to(devices[name])


def not_fused(*args: object, **kwargs: object) -> None:
    """Takes the place of the methods of diffusers that fuse q, k and v, or undo it."""
    log.warning(
        "q, k and v are not fused: they are quantized one by one, and the output is the same; a "
        'compiled graph (backend="dtq") quantizes their common input once'
    )


def _keep_separate(module: nn.Module, method: str) -> None:
    if hasattr(module, method):
        vars(module)[method] = not_fused


def restore(model: nn.Module) -> None:
    """Undo :func:`finalize` on a model whose linears are float again."""
    for module in model.modules():
        for name in [k for k, v in vars(module).items() if v in (not_fused, refuse_resizing)]:
            delattr(module, name)
    vars(model).pop("_skip_layerwise_casting_patterns", None)
    forget_packed_ties(model)
    use_int8_attention(model, ())
    remove_clock(model)


def finalize(
    model: nn.Module,
    edges: tuple[float, ...],
    policy: StepPolicy | None = None,
    *,
    align: bool = True,
) -> None:
    """Prepare a model with quantized linears to run.

    Disables what would break packed tensors, aligns tensors, and installs the fast GELU, the step
    clock and the NaN check.

    Args:
        model: the transformer.
        edges: inner edges of the timestep bins of static activation scales; empty without them.
        policy: the step policy, if there is one.
        align: whether to align tensors. Without, mapped tensors stay in their files: for a model
            that is saved and never run.
    """
    for module in model.modules():  # diffusers would concatenate the packed weights of q, k and v
        if any(isinstance(child, QuantLinear) for child in module.children()):
            _keep_separate(module, "fuse_projections")
    for method in ("fuse_qkv_projections", "unfuse_qkv_projections"):
        _keep_separate(model, method)
    has_table = any(isinstance(module, QuantEmbedding) for module in model.modules())
    if has_table and hasattr(model, "resize_token_embeddings"):
        vars(model)["resize_token_embeddings"] = refuse_resizing
    quantized = [n for n, m in model.named_modules() if isinstance(m, QuantLinear | WeightOnly)]
    others = getattr(type(model), "_skip_layerwise_casting_patterns", None) or ()
    # layerwise casting cannot change scales; casting the biases would save hardly any memory
    pattern = f"^({'|'.join(map(re.escape, quantized))})$"
    model._skip_layerwise_casting_patterns = [*others, pattern]  # type: ignore[assignment]
    for tensor in (*model.parameters(), *model.buffers()) if align else ():
        tensor.data = aligned(tensor.data)
    use_fast_gelu(model)
    if edges or policy is not None:
        install_clock(model, edges, policy)
    if nan_check.requested():
        nan_check.enable(model)
