# SPDX-License-Identifier: Apache-2.0
"""How long quantizing will take on this machine: how often the model runs, times a run."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import psutil
import torch
from torch import nn

from dtq.calibrate.engine import memory_batches
from dtq.calibrate.observers import HESSIAN_ROWS
from dtq.estimate.hardware import multiply_rate, touch
from dtq.estimate.solver_cost import kind, paces
from dtq.io.schema import MethodSpec
from dtq.models import Scan
from dtq.pipelines.sampling import count_dummy_calls
from dtq.plan.layers import Plan
from dtq.recipe.resolve import Recipe
from dtq.stages import sanity_metrics
from dtq.stages.candidates import NUM_INPUTS
from dtq.stages.record_calls import RECORDED_SAMPLES

TRACED_BATCH = 2  # pictures in the traced forward, see source._call_once
LOOKED = 1.3  # time of a call of the last look over that of another: layers are compared in it
_STEPS = 50  # of a sampler, where the recipe leaves them to the pipeline
_FORWARD = 1.3  # time of a model's products over that of its linears at the rate of a large one
_TOUCHED = 12  # passes over what goes into and comes out of linears: norms, copies, statistics


@dataclass(frozen=True)
class Runs:
    """How often the transformer is called.

    Attributes:
        calls: of the calibration.
        pictures: in a call, each branch of guidance counted.
        steps: of a sampler.
        branches: of guidance.
        looked: pictures through the model while the last look samples, replays and samples.
    """

    calls: int
    pictures: int
    steps: int
    branches: int
    looked: int


def runs_of(model: nn.Module, recipe: Recipe, driven: bool = True) -> Runs:
    """The calls that a recipe makes; a model without a pipeline gets a few made-up ones."""
    c = recipe.calibration
    batches, steps = -(-c.samples // c.batch_size), c.steps or _STEPS
    if not driven:
        looked = 2 * count_dummy_calls(sanity_metrics.short_settings(recipe))
        return Runs(count_dummy_calls(c), c.batch_size, steps, 1, looked)
    distilled = bool(getattr(getattr(model, "config", None), "guidance_embeds", False))
    branches = 1 if distilled or 0 < c.guidance <= 1 else 2
    looked = 3 * branches * min(steps, sanity_metrics.STEPS)
    pictures = branches * min(c.batch_size, c.samples)
    return Runs(batches * steps, pictures, steps, branches, looked)


def seconds(
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    needs: frozenset[str],
    runs: Runs,
    dtype: torch.dtype,
    *,
    memory: int | None = None,
    reading: float = 0.0,
) -> float:
    """Seconds to carry out a plan.

    Args:
        scan: traced linears.
        plan: what happens to them.
        recipe: for its calibration, comparisons, allocation and refinement.
        needs: statistics that are collected.
        runs: how often the model is called.
        dtype: compute dtype.
        memory: most bytes of statistics at once; default: half of what is available.
        reading: seconds to read the model's files once, which every call of a mapped model does.
    """
    rate, shapes = multiply_rate(torch.float32), {x.name: x.shape for x in scan.linears()}
    flops = sum(2 * rows * math.prod(shapes[n]) for n, rows in scan.rows.items())
    touched = sum(rows * sum(shapes[n]) for n, rows in scan.rows.items())
    picture = _FORWARD * flops / multiply_rate(dtype) + _TOUCHED * touched * touch()
    picture /= TRACED_BATCH

    def forward(pictures: int) -> float:
        return pictures * picture + reading

    looks = runs.looked // runs.branches
    total = looks * LOOKED * forward(runs.branches)
    total += forward(TRACED_BATCH) + 2 * reading  # traced, hashed, solved
    if needs:
        sites = [
            s for s in scan.input_groups if any(not plan[x.name].unquantized for x in s.linears)
        ]
        room = memory or psutil.virtual_memory().available // 2
        passes = len(memory_batches(sites, recipe.calibration.num_timestep_bins, needs, room))
        total += passes * runs.calls * forward(runs.pictures)
        if "hessian" in needs:
            counted = runs.calls * min(HESSIAN_ROWS, runs.pictures * _rows(scan))
            total += counted * sum(2 * s.columns**2 for s in sites) / rate
    sampled = runs.calls * runs.pictures * _rows(scan)
    total += _solving(scan, plan, recipe, needs, rate, sampled)
    refined = recipe.finetune.name != "none"
    if (
        recipe.transform_candidates
        or recipe.allocate.budget
        or recipe.step_policy.precisions
        or refined
    ):
        total += runs.steps * forward(RECORDED_SAMPLES * runs.branches)
    call = forward(RECORDED_SAMPLES * runs.branches)
    total += (
        (1 + len(recipe.transform_candidates)) * NUM_INPUTS * call
        if recipe.transform_candidates
        else 0.0
    )
    if recipe.allocate.budget:
        judged = sum(
            any(not plan[x.name].unquantized for x in s.linears) for s in scan.input_groups
        )
        total += judged * len(recipe.allocate.formats) * recipe.allocate.num_inputs * call
    if refined:
        blocks = len({x.name.split(".")[1] for x in plan.gemm() if "." in x.name})
        # a step trains one block, three times its forward; inputs are captured block by block
        total += (3 * dict(recipe.finetune.knobs).get("steps", 100) + 40 * blocks) * call
    return total


def _solving(
    scan: Scan, plan: Plan, recipe: Recipe, needs: frozenset[str], rate: float, sampled: int
) -> float:
    """Of every layer, in every version of it that the recipe compares."""
    versions = [plan.quantized()]
    for other in recipe.transform_candidates:
        versions.append([replace(x, transform=MethodSpec(other)) for x in plan.gemm()])
    for option in recipe.allocate.formats if recipe.allocate.budget else ():
        versions.append(
            [x.with_spec(weight_format=option) for x in plan.gemm() if x.weight_format != option]
        )
    layers = [layer for version in versions for layer in version]
    known = paces(layers, recipe, needs, rate, sampled)
    readers = {x.name: len(s.linears) for s in scan.input_groups for x in s.linears}
    return sum(
        known[kind(x)].seconds(x.shape, rate, "hessian" in needs, readers[x.name]) for x in layers
    )


def _rows(scan: Scan) -> int:
    """Of a picture, in most linears."""
    return statistics.mode(scan.rows.values()) // TRACED_BATCH
