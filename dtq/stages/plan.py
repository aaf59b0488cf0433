# SPDX-License-Identifier: Apache-2.0
"""Stage: scan the model and resolve the recipe to a plan of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from dtq.errors import InputError
from dtq.io.memory import paged_weights
from dtq.models import Scan
from dtq.pipelines import prompts, sampling
from dtq.pipelines.loading import LoadedModel, modules_of, scan_model
from dtq.pipelines.settings import SamplingSettings
from dtq.plan.layers import Plan
from dtq.recipe.resolve import Recipe


def plan_source(
    loaded: LoadedModel,
    recipe: Recipe,
    skip: Sequence[str] = (),
    calls: Sequence[dict[str, Any]] | None = None,
) -> tuple[Scan, Plan]:
    """Scan the model and resolve the recipe to its layers.

    Args:
        source: the model.
        recipe: what to do.
        skip: layers to keep.
        calls: keyword arguments of forwards; the first is traced, when there are any.

    Raises:
        InputError: it is quantized already, or no layer would be.
    """
    if getattr(loaded.model, "is_quantized", False):
        raise InputError(f"{loaded.name} is quantized already; give the float model")
    if loaded.scan is None:
        with paged_weights(*modules_of(loaded)):
            loaded.scan = scan_model(loaded.model, _first_call(loaded, recipe.calibration, calls))
    scan = loaded.scan
    keep = tuple(getattr(loaded.model, "_keep_in_fp32_modules", None) or ())
    plan = recipe.plan(scan, (*skip, *keep))
    if not plan.quantized():
        raise InputError(f"recipe {recipe.name} leaves every layer of {loaded.name} as it is")
    return scan, plan


def _first_call(
    loaded: LoadedModel, settings: SamplingSettings, calls: Sequence[dict[str, Any]] | None
) -> Any:
    """How to trace one forward: a given call, made-up inputs, or a step of the pipeline."""
    if calls:
        return lambda model: model(**calls[0])
    if loaded.family is not None or loaded.pipeline is None:
        return None
    pipeline, once = loaded.pipeline, replace(settings, samples=1, steps=1, batch_size=1)

    def run(model: nn.Module) -> None:
        for _ in sampling.run_pipeline(pipeline, prompts.load(once.prompts, pipeline, 1), once):
            pass

    return run
