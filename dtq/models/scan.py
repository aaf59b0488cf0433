# SPDX-License-Identifier: Apache-2.0
"""Scan any diffusers transformer: its linears, their input groups and their roles.

The scan traces one forward. On the meta device that needs no weights and hardly any time, so a
model of 12 billion parameters is planned in seconds. A 1 x 1 convolution counts as a linear.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from dtq.models.base import Family, InputGroup, Linear, Scan, sibling_key
from dtq.models.linears import (
    has_own_forward,
    is_convolution,
    is_linear,
    linears_of,
    matrix_shape,
    shape_of,
)
from dtq.models.roles import Trace, TracedInput, assign_roles, attention_projection, block_of
from dtq.models.tables import tables

_EMBEDS = re.compile(r"embed|embd|_emb(\.|$)|projection|projector|guidance_layer|conditioner", re.I)
_MIDDLE = re.compile(r"(^|\.)mid(dle)?_block$")
_STACK = 0.1
"""Share of all weights from which a list of modules without attention counts as blocks."""


def scan(model: nn.Module, family: Family | None, run: Callable[[nn.Module], object]) -> Scan:
    """Trace one forward, and group the linears by their input.

    An expert that no token chose is grouped like its siblings, with their roles.

    Args:
        model: the transformer, on any device, meta included.
        family: the family of its class, if there is one.
        run: calls the model, once or for a whole sampling run.

    Returns:
        The scan; ``traced`` is True.
    """
    trace = _trace(model, run)
    blocks = blocks_of(model)
    groups: dict[tuple[int, str], list[str]] = {}
    inner = _transformers_of(model, blocks)
    for name, traced in trace.inputs.items():
        groups.setdefault((traced.tensor, block_of(name, inner)), []).append(name)
    idle = _idle_experts(model, trace.inputs)
    for name, sibling in idle.items():
        key = trace.inputs[sibling].tensor, name.rpartition(".")[0]
        groups.setdefault(key, []).append(name)
    names = [*groups.values()]
    roles = assign_roles(model, family, blocks, names, trace)
    roles |= {name: roles[sibling] for name, sibling in idle.items()}
    return Scan(
        family.name if family else "generic",
        tuple(_input_group(model, group, roles) for group in names),
        tuple(sorted({n for n, _ in linears_of(model)} - set(trace.inputs) - set(idle))),
        rows={name: traced.rows for name, traced in trace.inputs.items()},
        unsupported=unsupported(model, blocks),
        convolutions=convolutions(model, blocks),
        tables=tables(model, trace.embeddings),
    )


def scan_names(model: nn.Module, family: Family | None) -> Scan:
    """Scan a model that cannot be run: roles come from names, each linear is a group of its own."""
    names = [[name] for name, _ in linears_of(model)]
    blocks = blocks_of(model)
    roles = assign_roles(model, family, blocks, names, Trace())
    return Scan(
        family.name if family else "generic",
        tuple(_input_group(model, name, roles) for name in names),
        traced=False,
        unsupported=unsupported(model, blocks),
        convolutions=convolutions(model, blocks),
        tables=tables(model),
    )


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the repeated blocks, ``transformer_blocks.3.`` for example.

    Blocks are the elements of the outermost lists of modules that contain attention. A list without
    attention counts too if it holds a large share of the weights and is not an embedder. The middle
    of a U-Net is a block of its own.
    """
    total = sum(math.prod(shape_of(m)) for _, m in linears_of(model))
    prefixes: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for key, child in module.named_children():
            name = f"{prefix}{key}"
            if isinstance(child, nn.ModuleList | nn.Sequential) and _is_stack(child, name):
                prefixes.extend(f"{name}.{index}." for index, _ in child.named_children())
            elif _MIDDLE.search(name) and _is_stack(child, name):
                prefixes.append(f"{name}.")
            else:
                visit(child, f"{name}.")

    def _is_stack(modules: nn.Module, name: str) -> bool:
        # linears inside of an element: a list whose elements are linears is no stack
        deep = [(n, m) for n, m in linears_of(modules) if "." in n]
        if any(attention_projection(n) in ("q", "qkv") for n, _ in deep):
            return True
        weights = sum(math.prod(shape_of(m)) for _, m in deep)
        return not _EMBEDS.search(name) and weights > _STACK * total

    visit(model, "")
    return tuple(prefixes)


def _transformers_of(model: nn.Module, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The transformer blocks inside of blocks that are lists of them, as in U-Nets, then blocks.

    Layers of different transformer blocks that read the same tensor, such as the text, are then
    not of one input group.
    """
    inner = [
        f"{name}.{index}."
        for name, module in model.named_modules()
        if name.endswith(".transformer_blocks") and block_of(name, blocks)
        for index, _ in module.named_children()
    ]
    return (*inner, *blocks)


def convolutions(model: nn.Module, blocks: tuple[str, ...]) -> tuple[Linear, ...]:
    """Convolutions in blocks that are no linears, as matrices (O, I / groups * kernel)."""
    return tuple(
        Linear(name, "conv", matrix_shape(module), module.bias is not None)
        for name, module in model.named_modules()
        if block_of(f"{name}.", blocks) and is_convolution(module) and not is_linear(module)
    )


def unsupported(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, str]:
    """Weights in blocks, and Conv1D, that dtq cannot quantize, by name, and what they are."""
    weights = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":  # of transformers; in GPT-2 there is nothing else
            weights[f"{name}.weight"] = "Conv1D, whose matrix is transposed"
        if not block_of(f"{name}.", blocks) or is_linear(module):
            continue
        for key, weight in module.named_parameters(recurse=False):
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and key == "weight":
                kernel = "x".join(map(str, module.kernel_size))
                own = ""
                if math.prod(module.kernel_size) == 1 and has_own_forward(module):
                    own = " and a forward of its own"
                weights[f"{name}.{key}"] = f"convolution with a {kernel} kernel{own}"
            elif weight.ndim == 3 and min(weight.shape) > 1:
                shape = "x".join(map(str, weight.shape))
                weights[f"{name}.{key}"] = f"matrices packed in one parameter of {shape}"
    return weights


def _trace(model: nn.Module, run: Callable[[nn.Module], object]) -> Trace:
    trace = Trace()
    with ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(model.register_forward_pre_hook(trace.see_batch, with_kwargs=True))
        for name, module in linears_of(model):
            hook = partial(trace.see_input, name)
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                see = partial(_see_embedding, trace, name)
                hooks.enter_context(module.register_forward_pre_hook(see))
        run(model)
    return trace


def _see_embedding(trace: Trace, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    trace.embeddings.add(name)


def _idle_experts(model: nn.Module, inputs: Mapping[str, TracedInput]) -> dict[str, str]:
    """Linears of experts that were not called, each with a sibling that was."""
    called = {sibling_key(name): name for name in inputs if "expert" in name}
    idle = [name for name, _ in linears_of(model) if name not in inputs]
    return {name: called[sibling_key(name)] for name in idle if sibling_key(name) in called}


def _input_group(model: nn.Module, names: list[str], roles: Mapping[str, str]) -> InputGroup:
    linears = []
    for name in names:
        module: Any = model.get_submodule(name)
        linears.append(Linear(name, roles[name], shape_of(module), module.bias is not None))
    return InputGroup(names[0], tuple(linears))
