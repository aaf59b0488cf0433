# SPDX-License-Identifier: Apache-2.0
"""Stage: scan the model and resolve the recipe to a plan of its layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from dtq.engines import find_target
from dtq.engines.constrain import constrain
from dtq.engines.original import config_of, joined_layers, key_map
from dtq.errors import InputError
from dtq.io.memory import paged_weights
from dtq.models.linears import is_pointwise, linears_of
from dtq.pipelines import prompts, sampling
from dtq.pipelines.loading import modules_of
from dtq.pipelines.tracing import scan_model
from dtq.stages.budget import fitting_budget
from dtq.stages.float_model import check_float_model, check_forwards, kept_in_float, tied_weights
from dtq.stages.run import Run


def plan(run: Run) -> None:
    """Scan the model, unless it was scanned before, and resolve the recipe to its layers.

    Raises:
        InputError: the model is quantized already, or is not the plain float model; no layer would
            be quantized; or the budget is below what the narrowest formats need.
        RecipeError: the target of the run cannot hold what the recipe asks for.
    """
    loaded, recipe = run.loaded, run.recipe
    if getattr(loaded.model, "is_quantized", False):
        raise InputError(f"{loaded.name} is quantized already; give the float model")
    check_float_model(loaded.model, loaded.name)
    loaded.model.eval()  # as from_pretrained leaves it; DiT's label embedder drops labels otherwise
    if loaded.scan is None:
        with paged_weights(*modules_of(loaded)):
            loaded.scan = scan_model(loaded.model, _first_call(run))
    run.scan = loaded.scan
    kept = kept_in_float(loaded.model)
    run.plan = recipe.plan(run.scan, (*run.exclude, *kept), tied_weights(loaded.model))
    if run.target and run.plan.convolutions():
        raise InputError(
            f"{run.target} holds float convolutions, and recipe {recipe.name} asks for 8-bit ones: "
            f"leave --to out, or --set convolutions=keep"
        )
    if run.target and run.plan.tables():
        raise InputError(
            f"{run.target} holds float embeddings, and recipe {recipe.name} asks for packed ones: "
            f"leave --to out, or --set embeddings=keep"
        )
    if run.target:
        convolutions = [name for name, m in linears_of(loaded.model) if is_pointwise(m)]
        target = find_target(run.target)
        names = key_map(config_of(loaded.model)) if target.original_names else None
        run.joined = {} if names is None else joined_layers(names)
        run.plan = constrain(run.plan, recipe, target, convolutions, run.joined)
    if not run.plan.quantized():
        why = Counter(run.scan.unsupported.values()).most_common()
        reasons = "".join(f"; {count} weights: {reason}" for reason, count in why)
        raise InputError(
            f"recipe {recipe.name} leaves every layer of {loaded.name} unquantized{reasons}"
        )
    check_forwards(loaded.model, (layer.name for layer in run.plan.quantized()))
    if recipe.allocate.budget:
        run.recipe = replace(recipe, allocate=fitting_budget(run))


def _first_call(run: Run) -> Any:
    """How to trace one forward: on given inputs, on random ones (None), or a pipeline step."""
    if run.inputs:
        first = run.inputs[0]

        def forward(model: nn.Module) -> None:
            with sampling.translate_call_errors(type(model).__name__, "it is inputs[0]"):
                model(**first)

        return forward
    pipeline = run.loaded.pipeline
    if run.loaded.family is not None or pipeline is None:
        return None
    once = replace(run.recipe.calibration, samples=1, batch_size=1)
    if len(run.loaded.models()) == 1:  # another one may have the first step
        once = replace(once, steps=1)

    def sample(model: nn.Module) -> None:
        list(sampling.run_pipeline(pipeline, prompts.load(once.prompts, pipeline, 1), once))

    return sample
