# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are its blocks, and in which order they run."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from dtq.nn.linear import QuantLinear
from dtq.pipelines.recorded_calls import RecordedCall, call_module

log = logging.getLogger("dtq")


def find(model: nn.Module) -> list[str]:
    """Names of the elements of the outermost module lists that have quantized linears."""
    names: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for key, child in module.named_children():
            name = f"{prefix}{key}"
            plain = not isinstance(child, nn.ModuleList | nn.ModuleDict)
            if not (isinstance(module, nn.ModuleList) and plain):
                visit(child, f"{name}.")
            elif any(isinstance(m, QuantLinear) for m in child.modules()):
                names.append(name)

    visit(model, "")
    return names


@torch.no_grad()
def in_order(model: nn.Module, call: RecordedCall) -> list[str]:
    """Names of the blocks that a call runs, in the order of their first run."""
    order: dict[str, None] = {}
    names = find(model)

    def note(name: str, module: nn.Module, args: object) -> None:
        order.setdefault(name)

    with ExitStack() as hooks:
        for name in names:
            block = model.get_submodule(name)
            hooks.enter_context(block.register_forward_pre_hook(partial(note, name)))
        call_module(model, call)
    if unused := [name for name in names if name not in order]:
        log.warning("finetune: the first call does not run %s; left as they are", ", ".join(unused))
    return list(order)


def layers_of(model: nn.Module, name: str) -> dict[str, QuantLinear]:
    """The quantized linears of a block, by dotted name in the model."""
    return {
        f"{name}.{inner}".rstrip("."): module
        for inner, module in model.get_submodule(name).named_modules()
        if isinstance(module, QuantLinear)
    }
