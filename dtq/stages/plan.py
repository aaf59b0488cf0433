# SPDX-License-Identifier: Apache-2.0
"""Stage: scan the model and resolve the recipe to a plan of its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dtq.errors import InputError
from dtq.io.memory import paged_weights
from dtq.models.linears import linears_of
from dtq.pipelines import prompts, sampling
from dtq.pipelines.loading import modules_of, scan_model
from dtq.pipelines.stored_tensors import is_saturated
from dtq.stages.budget import fitting_budget
from dtq.stages.run import Run


def plan(run: Run) -> None:
    """Scan the model, unless it was scanned before, and resolve the recipe to its layers.

    Raises:
        InputError: the model is quantized already, compiled or cached, its weights are codes, no
            layer would be quantized, or the budget is below what the narrowest formats need.
    """
    loaded, recipe = run.loaded, run.recipe
    if getattr(loaded.model, "is_quantized", False):
        raise InputError(f"{loaded.name} is quantized already; give the float model")
    _check_weights(loaded.model, loaded.name)
    _check_plain(loaded.model)
    loaded.model.eval()  # as from_pretrained leaves it; DiT's label embedder drops labels otherwise
    if loaded.scan is None:
        with paged_weights(*modules_of(loaded)):
            loaded.scan = scan_model(loaded.model, _first_call(run))
    run.scan = loaded.scan
    in_fp32 = tuple(getattr(loaded.model, "_keep_in_fp32_modules", None) or ())
    run.plan = recipe.plan(run.scan, (*run.exclude, *in_fp32))
    if not run.plan.quantized():
        raise InputError(f"recipe {recipe.name} leaves every layer of {loaded.name} unquantized")
    if recipe.allocate.budget:
        run.recipe = replace(recipe, allocate=fitting_budget(run))


def _check_plain(model: nn.Module) -> None:
    """Refuse a model whose calls may skip layers (a cache), or hooks on them (a compiled graph)."""
    cached = bool(getattr(model, "is_cache_enabled", False) or getattr(model, "_is_cached", False))
    for module in model.modules():
        calls = (module.__call__, vars(module).get("forward"), module._compiled_call_impl)
        if any(hasattr(call, "_torchdynamo_orig_callable") for call in calls):
            raise InputError(
                f"{type(model).__name__} is compiled, and a compiled graph has no hooks on its "
                f"layers: quantize the plain model, and compile it afterwards"
            )
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        homes = {type(hook).__module__.rpartition(".")[2] for hook in hooks.values()}
        cached |= any("cache" in home or home.endswith("broadcast") for home in homes)
    if cached:
        raise InputError(
            f"a cache of {type(model).__name__} is on, so that calibration would see a part of its "
            f"calls: disable_cache() first, quantize, and enable the cache afterwards"
        )


def _check_weights(model: nn.Module, name: str) -> None:
    """Refuse weights that are codes: integers, or FP8 codes that were loaded without their scale.

    Codes reach the largest value of FP8 in every layer, so that a few layers are enough.
    """
    layers = [*linears_of(model)]
    for layer, module in layers:
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point():
            raise InputError(f"{name}: {layer}.weight is {weight.dtype}; give the float model")
    for layer, module in layers[:: max(1, len(layers) // 8)]:
        if module.weight.device.type != "meta" and is_saturated(module.weight):  # type: ignore[union-attr, arg-type]
            raise InputError(
                f"{name}: the largest entry of {layer}.weight is the largest value of FP8: these "
                f"are codes without their scale; give the float model"
            )


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
