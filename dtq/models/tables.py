# SPDX-License-Identifier: Apache-2.0
"""Tables of token embeddings: which modules they are, and which others share their weight."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Mapping

from torch import nn

from dtq.models.base import Table
from dtq.models.linears import has_own_forward, matrix_shape

LEAST_SHARE = 0.02
"""Share of the weights of its model below which a table is not worth its error."""

_NOT_TOKENS = re.compile(r"position|relative|token_type|segment", re.I)


def tables(model: nn.Module, called: Collection[str] | None = None) -> tuple[Table, ...]:
    """The tables of a model that can be stored in fewer bits.

    A table is an ``nn.Embedding`` with at least 2 % of the weights of the model. Tables of
    positions and of types of tokens are none, by their names; neither is one that changes its rows
    (``max_norm``), that takes more than ids, or whose weight a module has that cannot compute with
    packed rows.

    Args:
        model: float, on any device.
        called: names of the embeddings that a traced forward has called; others, such as those of
            towers for images, stay float. None: the model could not be traced, and the table is the
            one that ``get_input_embeddings`` of transformers names.
    """
    if called is None:
        inputs = getattr(model, "get_input_embeddings", lambda: None)()
        called = {name for name, module in model.named_modules() if module is inputs}
    total = sum(parameter.numel() for parameter in model.parameters())
    targets, found = _ties(model), []
    for name, module in model.named_modules():
        if not is_table(module) or _NOT_TOKENS.search(name) or f"{name}.weight" in targets:
            continue
        tied, shape = tied_modules(model, name), matrix_shape(module)
        if {name, *tied}.isdisjoint(called) or tie_problem(model, name):
            continue
        if math.prod(shape) >= LEAST_SHARE * total:
            found.append(Table(name, "vocab", shape, bias=False, tied=tuple(tied)))
    return tuple(found)


def is_table(module: nn.Module) -> bool:
    """Whether a module is a float table whose forward takes ids alone."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    arguments = len(inspect.signature(type(module).forward).parameters)
    weight = module._parameters.get("weight")
    floating = isinstance(weight, nn.Parameter) and weight.is_floating_point()
    return floating and arguments == 2  # self, and the ids


def tied_modules(model: nn.Module, name: str) -> list[str]:
    """Names of the modules whose weight transformers ties to that of ``name``."""
    ties = _ties(model).items()
    return [target.removesuffix(".weight") for target, source in ties if source == f"{name}.weight"]


def tie_problem(model: nn.Module, name: str) -> str:
    """Why a table cannot be packed together with the modules that have its weight; or empty."""
    weight, tied = model.get_submodule(name).weight, tied_modules(model, name)
    for other in tied:
        module = model.get_submodule(other)
        plain = isinstance(module, nn.Linear) and not has_own_forward(module)
        if not plain and not is_table(module):
            return f"its weight is tied to {other}, a {type(module).__name__}"
    every = {
        n for n, m in model.named_modules(remove_duplicate=False)
        if m._parameters.get("weight") is weight
    }  # fmt: skip
    if unknown := sorted(every - {name, *tied}):
        return f"its weight is also that of {unknown[0]}, by no tie of transformers"
    return ""


def _ties(model: nn.Module) -> Mapping[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}
