# SPDX-License-Identifier: Apache-2.0
"""Budgets of a recipe on the model at hand: refused, or adapted, where its layers need more."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace

from dtq.allocate import parse_budget
from dtq.engines.constrain import in_format
from dtq.errors import InputError
from dtq.plan.layers import LayerPlan, LayerSpec
from dtq.recipe.schema import Allocate
from dtq.stages.run import Run

log = logging.getLogger("dtq")

_WIDE = LayerPlan("", "other", (4096, 4096))
"""A layer that fits every format, and whose scales per row weigh next to nothing."""


def fitting_budget(run: Run) -> Allocate:
    """The recipe's ``allocate``, with a budget that its formats can reach on this model.

    A budget that they reach is kept. Otherwise, with ``adapt``, it becomes the least that they need
    and the margin that it has above the narrowest format on wide layers.

    Args:
        run: with a plan.

    Raises:
        InputError: the budget is too small, and the recipe does not let it adapt.
    """
    allocate = run.recipe.allocate
    layers = run.plan.gemm()
    weights = sum(math.prod(x.shape) for x in layers)
    budget = parse_budget(str(allocate.budget), weights)
    sizes = list(_sizes(run, layers))
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    if budget >= least:
        return allocate
    needed = (
        f"{run.loaded.name}: allocate.budget (--budget) of {allocate.budget} is too small: the "
        f"formats {', '.join(allocate.formats)} need at least {least} bytes "
        f"({8 * least / weights:.3f} bits per weight)"
    )
    if not allocate.adapt:
        raise InputError(f"{needed}. Raise it, or allow narrower formats")
    margin = max(0.0, budget - weights * min(map(_bits, allocate.formats)) / 8)
    chosen = min(least + margin, most)
    bits = math.ceil(8 * chosen / weights * 1e4) / 1e4
    log.warning("%s; recipe %s takes %.4f", needed, run.recipe.name, bits)
    return replace(allocate, budget=str(bits))


def promotion_budget(run: Run) -> float:
    """Bits per weight that the layers may take after promotion."""
    promote, plan = run.recipe.promote, run.plan
    needed = plan.bits(plan.gemm())
    if not promote.adapt or needed <= promote.budget:
        return promote.budget
    return needed + max(0.0, promote.budget - _bits(run.recipe.weights))


def _sizes(run: Run, layers: Iterable[LayerPlan]) -> Iterable[list[int]]:
    """Bytes of each input group in each format, which all its linears share."""
    by_name = {x.name: x for x in layers}
    for group in run.scan.input_groups:
        if members := [by_name[x.name] for x in group.linears if x.name in by_name]:
            formats = run.recipe.allocate.formats
            yield [
                sum(in_format(x, f, run.target).nbytes(run.plan.bins) for x in members)
                for f in formats
            ]


def _bits(weight_format: str) -> float:
    return replace(_WIDE, spec=LayerSpec(weight_format, "none")).bits()
