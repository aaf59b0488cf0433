# SPDX-License-Identifier: Apache-2.0
"""Stage: scan the model and resolve the recipe to a plan of its layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from dtq.allocate import parse_budget
from dtq.errors import InputError
from dtq.io.memory import paged_weights
from dtq.pipelines import prompts, sampling
from dtq.pipelines.loading import modules_of, scan_model
from dtq.plan.layers import Plan
from dtq.recipe import Recipe
from dtq.stages.float_model import check_float_model, check_forwards
from dtq.stages.run import Run


def plan(run: Run) -> None:
    """Scan the model, unless it was scanned before, and resolve the recipe to its layers.

    Raises:
        InputError: the model is quantized already, or has been changed in a way that quantizing
            would undo; no layer would be quantized; or the budget is below what the narrowest
            formats need.
    """
    loaded, recipe = run.loaded, run.recipe
    if getattr(loaded.model, "is_quantized", False):
        raise InputError(f"{loaded.name} is quantized already; give the float model")
    check_float_model(loaded.model)
    loaded.model.eval()  # as from_pretrained leaves it; DiT's label embedder drops labels otherwise
    if loaded.scan is None:
        with paged_weights(*modules_of(loaded)):
            loaded.scan = scan_model(loaded.model, _first_call(run))
    run.scan = loaded.scan
    in_fp32 = tuple(getattr(loaded.model, "_keep_in_fp32_modules", None) or ())
    run.plan = recipe.plan(run.scan, (*run.exclude, *in_fp32))
    if not run.plan.quantized():
        raise InputError(f"recipe {recipe.name} leaves every layer of {loaded.name} unquantized")
    check_forwards(loaded.model, (layer.name for layer in run.plan.quantized()))
    if recipe.allocate.budget:
        _check_budget(run.plan, recipe)


def _first_call(run: Run) -> Any:
    """How to trace one forward: on given inputs, on random ones (None), or a pipeline step."""
    if run.inputs:
        first = run.inputs[0]
        return lambda model: model(**first)
    pipeline = run.loaded.pipeline
    if run.loaded.family is not None or pipeline is None:
        return None
    once = replace(run.recipe.calibration, samples=1, steps=1, batch_size=1)

    def sample(model: nn.Module) -> None:
        list(sampling.run_pipeline(pipeline, prompts.load(once.prompts, pipeline, 1), once))

    return sample


def _check_budget(plan: Plan, recipe: Recipe) -> None:
    """Refuse a budget below the narrowest formats before any work is done."""
    formats = recipe.allocate.formats
    weights = sum(math.prod(x.shape) for x in plan.gemm())
    budget = parse_budget(str(recipe.allocate.budget), weights)
    least = sum(min(x.in_format(f).nbytes(plan.bins) for f in formats) for x in plan.gemm())
    if budget < least:
        raise InputError(
            f"a budget of {recipe.allocate.budget} is too small: the formats "
            f"{', '.join(formats)} need at least {least} bytes "
            f"({8 * least / weights:.3f} bits per weight). Raise it, or allow narrower formats"
        )
