# SPDX-License-Identifier: Apache-2.0
"""A rough run time: the operations of a run, divided by one rate that is measured on this machine.

It tells minutes from hours. During the run the progress bars show the remaining time.
"""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import replace

import psutil
import torch

from dtq.calibrate.engine import memory_batches, observed_of
from dtq.calibrate.gradients import CALLS, ROWS, output_parts
from dtq.io.schema import MethodSpec
from dtq.linalg.cholesky import factor_cost
from dtq.models import InputGroup, blocks_of
from dtq.pipelines.sampling import count_dummy_calls
from dtq.plan.layers import LayerPlan
from dtq.stages.attention import INPUTS
from dtq.stages.candidates import NUM_INPUTS
from dtq.stages.record_calls import RECORDED_SAMPLES
from dtq.stages.run import Run
from dtq.stages.sanity_metrics import STEPS, short_settings
from dtq.transforms import TRANSFORMS

TRACED_BATCH = 2
"""Images in the traced forward pass, see ``dtq.pipelines.tracing``."""
OVERHEAD = 1.5
"""Time of a model evaluation, with its statistics, over that of the GEMMs of its linears."""
SOLVER_OPERATIONS = 5000.0
"""Operations per weight to round it: 1e3 to 1e4 by recipe, as measured on the bundled model."""
SEARCH_OPERATIONS = 5.0
"""GEMMs of sampled rows that a search of transforms takes, times its step size."""
DEFAULT_STEPS = 50
"""Sampler steps, where the recipe leaves them to the pipeline."""


def run_seconds(
    run: Run, dtype: torch.dtype, needs: frozenset[str], has_pipeline: bool = True
) -> float:
    """Seconds that a planned run takes on this machine, within a factor of about three.

    Args:
        run: after the plan stage, its model traced.
        dtype: compute dtype.
        needs: statistics that are collected.
        has_pipeline: whether a pipeline calls the model; else it is called on random inputs.
    """
    shapes = {x.name: math.prod(x.shape) for x in run.scan.linears()}
    rows = run.scan.rows.items()
    image = sum(2.0 * count * shapes[name] for name, count in rows) / TRACED_BATCH
    images = sum(model_evaluations(run, needs, has_pipeline).values())
    return (OVERHEAD * image * images + solver_operations(run, needs)) / gemm_rate(dtype)


def model_evaluations(run: Run, needs: frozenset[str], has_pipeline: bool) -> dict[str, int]:
    """Images that pass through the transformer, by stage; each branch of guidance is an image.

    int8 attention is counted as if the error stayed within its limit in every module. Where it does
    not, the stage also runs the model for each module, and again for each step of a bisection.

    Args:
        run: after the plan stage.
        needs: statistics that are collected.
        has_pipeline: whether a pipeline calls the model.
    """
    recipe, settings = run.recipe, run.recipe.calibration
    steps = settings.steps or DEFAULT_STEPS
    branches = guidance_branches(run) if has_pipeline else 1
    groups = quantized_groups(run)
    room = run.memory or psutil.virtual_memory().available // 2
    names = {x.name for x in run.plan.quantized()}
    observed = observed_of(groups, names, needs)
    passes = len(memory_batches(observed, settings.num_timestep_bins, needs, room)) if needs else 0
    per_pass = settings.samples * steps * branches
    calls = -(-settings.samples // settings.batch_size) * steps
    rows = max(run.scan.rows.values(), default=1) / TRACED_BATCH  # of an image
    differentiated = min(settings.batch_size * branches, math.ceil(ROWS / max(rows, 1)))
    checked = 3 * branches * min(steps, STEPS)  # float samples, replayed; quantized samples
    if not has_pipeline:
        per_pass = count_dummy_calls(settings) * settings.batch_size
        checked = 2 * count_dummy_calls(short_settings(recipe)) * bool(needs)
    transforms = len(recipe.transform_candidates) if has_pipeline else 0
    formats = len(run.formats)
    search = recipe.step_policy
    finetuned, blocks = recipe.finetune.name != "none", len(blocks_of(run.model))
    # a step trains one block of all, in three times its forward; 40 calls per block are its targets
    trained = 3 * dict(recipe.finetune.knobs).get("steps", 100) + 40 * blocks
    int8_attention = recipe.attention == "int8"
    recorded = bool(transforms or formats or search.precisions or finetuned or int8_attention)
    call = RECORDED_SAMPLES * branches  # images of a recorded call
    return {
        "calibrate": passes * per_pass,
        # forward and backward
        "gradients": ("gradients" in needs) * 3 * passes * min(calls, CALLS) * differentiated,
        "record calls": recorded * steps * call,
        "compare transforms": bool(transforms) * (1 + transforms) * min(NUM_INPUTS, steps) * call,
        "mixed precision": len(groups) * formats * min(recipe.allocate.num_inputs, steps) * call,
        "finetune": finetuned * trained * call,
        "step policy": len(search.precisions) * search.num_bins * search.num_inputs * call,
        "attention": int8_attention * 2 * min(INPUTS, steps) * call,
        "sanity check": checked,
    }


def guidance_branches(run: Run) -> int:
    """2 with classifier-free guidance, else 1."""
    distilled = bool(getattr(getattr(run.model, "config", None), "guidance_embeds", False))
    scale = run.recipe.calibration.guidance
    return 1 if distilled or (scale is not None and scale <= 1) else 2


def solver_operations(run: Run, needs: frozenset[str]) -> float:
    """Operations to quantize every layer, in every version of it that the recipe compares.

    Args:
        run: after the plan stage.
        needs: statistics that are collected; GPTQ takes more with Hessians.
    """
    plan = run.plan
    readers = {x.name: len(g.linears) for g in run.scan.input_groups for x in g.linears}
    # what is no linear is rounded once, without data, which takes no time in comparison
    layers = [x for x in plan.quantized() if x.name in readers]
    for name in run.recipe.transform_candidates:
        layers += [replace(x, transform=MethodSpec(name)) for x in plan.gemm()]
    for name in run.formats:
        layers += [x for x in plan.gemm() if x.weight_format != name]
    total = 0.0
    for layer in layers:
        n, k = layer.shape
        total += SOLVER_OPERATIONS * n * k + (_search_operations(layer) if needs else 0.0)
        if "hessian" in needs:
            total += 2.0 * n * k * k + factor_cost(k)[1] / readers[layer.name]
        if "gradients" in needs:
            widths = [x.columns for x in output_parts(layer.name, n)]
            total += sum(factor_cost(x)[1] + 2.0 * k * x**2 for x in widths)
    return total


def _search_operations(layer: LayerPlan) -> float:
    """Operations to choose a transform by its output error on sampled rows, a GEMM each."""
    parameters = inspect.signature(TRANSFORMS[layer.transform.name].call).parameters
    knobs = {name: knob.default for name, knob in parameters.items()} | dict(layer.transform.knobs)
    n, k = layer.shape
    gemm = 2.0 * knobs.get("num_rows", 0) * k * min(n, knobs.get("num_channels", n))
    return SEARCH_OPERATIONS / knobs.get("step", 1.0) * gemm


def gemm_rate(dtype: torch.dtype) -> float:
    """Floating point operations per second of a matrix product here, the best of four."""
    a = torch.randn(768, 768).to(dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best


def quantized_groups(run: Run) -> list[InputGroup]:
    """Input groups with a quantized linear."""
    kept = {x.name for x in run.plan.layers if x.unquantized}
    return [g for g in run.scan.input_groups if not kept.issuperset(x.name for x in g.linears)]
