# SPDX-License-Identifier: Apache-2.0
"""Size of the file, and peaks of memory and disk, worked out before a run."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, replace

import psutil
import torch
from torch import nn

from dtq.allocate import parse_budget
from dtq.calibrate.engine import nbytes, observed_of
from dtq.calibrate.gradients import output_parts
from dtq.checkpoint.reader import predicted_bytes
from dtq.estimate.duration import quantized_groups, run_seconds
from dtq.linalg.cholesky import factor_cost
from dtq.models import blocks_of
from dtq.stages.budget import promotion_budget
from dtq.stages.file_tensors import file_tensors
from dtq.stages.run import Run
from dtq.stages.solve import COPIES


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, time in seconds.

    Attributes:
        file: exact size of the transformer's safetensors file if no layer is promoted.
        file_most: if the whole budget of promotion or of mixed precision is spent.
        budget: this budget, as it is on this model; bits per weight, or a size.
        float_file: of the float transformer in the compute dtype.
        memory: peak while quantizing, see :func:`peak_memory`.
        disk: peak while quantizing, the output included, see :func:`disk_needed`.
        seconds: rough, on this machine; None if the model could not be traced.
    """

    file: int
    file_most: int
    budget: str
    float_file: int
    memory: int
    disk: int
    seconds: float | None


def estimate(
    run: Run,
    dtype: torch.dtype,
    *,
    needs: frozenset[str] | None = None,
    mapped: bool = False,
    has_pipeline: bool = True,
    around: int = 0,
) -> Estimate:
    """Estimate the cost of a planned run, carried out by the command line.

    Args:
        run: after the plan stage; a model on the meta device will do. Its ``memory`` limits the
            statistics.
        dtype: compute dtype, that of every unquantized tensor.
        needs: statistics that are collected; default: those that the recipe needs.
        mapped: see :func:`peak_memory`.
        has_pipeline: whether a pipeline calls the model. A bare transformer is called on random
            inputs, and no transforms are compared on these.
        around: see :func:`peak_memory`.
    """
    plan, recipe = run.plan, run.recipe
    needs = recipe.needs() if needs is None else needs
    file = predicted_bytes(file_tensors(run.model, plan, dtype))
    gemm = sum(math.prod(x.shape) for x in plan.gemm())
    promotion = promotion_budget(run)
    spare = max(0.0, promotion - plan.bits(plan.gemm())) if recipe.promote.to else 0.0
    most, budget = file + round(spare * gemm / 8), f"{promotion:.4g}"
    if recipe.allocate.budget:
        budget = str(recipe.allocate.budget)
        allowed = parse_budget(budget, gemm)
        most = file - sum(x.nbytes(plan.bins) for x in plan.gemm()) + allowed
    floats = sum(t.numel() * dtype.itemsize for t in run.model.state_dict().values())
    if not has_pipeline:
        run = copy.copy(run)
        run.recipe = replace(recipe, transform_candidates=())
    return Estimate(
        file,
        most,
        budget,
        floats,
        peak_memory(run, needs, dtype, mapped=mapped, around=around),
        disk_needed(run, needs, most),
        run_seconds(run, dtype, needs, has_pipeline) if run.scan.traced else None,
    )


def peak_memory(
    run: Run, needs: frozenset[str], dtype: torch.dtype, *, mapped: bool = False, around: int = 0
) -> int:
    """Bytes at the peak, in this process.

    The process itself, the float model, and the largest of what follows one after another: the
    statistics, and what the pipeline holds while it calibrates; solving the linears of one input
    group; the quantized model, as it is written.

    Args:
        run: after the plan stage; a model on the meta device will do.
        needs: statistics that are collected.
        dtype: compute dtype.
        mapped: see :func:`resident_weights`.
        around: of the other models of the pipeline, and of activations while it calibrates.
    """
    plan, bins = run.plan, run.recipe.calibration.num_timestep_bins
    statistics, solving = 0, 0
    names = {x.name for x in plan.quantized()}
    for group in quantized_groups(run):
        layers = [plan[x.name] for x in group.linears]
        counts = [math.prod(x.shape) for x in layers if not x.unquantized]
        stats = sum(nbytes(x, bins, needs) for x in observed_of([group], names, needs) if needs)
        statistics += stats
        # the weights of the group, and the copies that the solver makes of one of them
        working = 4 * sum(counts) + COPIES * 4 * max(counts) + stats
        if "hessian" in needs:  # it is rotated in float32, and factored
            working += 2 * 4 * group.columns**2 + factor_cost(group.columns)[0]
        if "gradients" in needs:  # the blocks of one linear, in two orders and factored
            widest = max(layers, key=lambda x: x.shape[0])
            parts = output_parts(widest.name, widest.shape[0])
            working += sum(3 * 4 * x.columns**2 for x in parts)
        solving = max(solving, working)
    quantized = sum(x.nbytes(plan.bins) for x in plan.quantized())
    process = psutil.Process().memory_info().rss
    statistics = min(statistics, run.memory or statistics) + around
    resident = resident_weights(run.model, dtype, mapped=mapped)
    return process + resident + max(statistics, solving, quantized)


def resident_weights(model: nn.Module, dtype: torch.dtype, *, mapped: bool) -> int:
    """Bytes of the float weights of a model that are in memory at a time.

    Args:
        model: on any device.
        dtype: compute dtype.
        mapped: whether the files have that dtype, so that they are mapped and not read: then one
            block at a time is resident, in addition to what lies outside of blocks.
    """
    floats: Counter[str] = Counter()
    blocks = blocks_of(model)
    for name, tensor in model.state_dict().items():
        block = next((prefix for prefix in blocks if name.startswith(prefix)), "")
        floats[block] += tensor.numel() * dtype.itemsize
    outside = floats.pop("", 0)
    return outside + (max(floats.values(), default=0) if mapped else floats.total())


def disk_needed(run: Run, needs: frozenset[str], output: int) -> int:
    """Bytes on disk at the peak: statistics, solved layers of every alternative, the output.

    Args:
        run: after the plan stage. A file with as many statistics as its ``memory`` allows is
            replaced by the next one.
        needs: statistics that are collected.
        output: bytes of the output.
    """
    plan, recipe = run.plan, run.recipe
    names = {x.name for x in plan.quantized()}
    observed = observed_of(quantized_groups(run), names, needs) if needs else []
    bins = recipe.calibration.num_timestep_bins
    statistics = sum(nbytes(x, bins, needs) for x in observed)
    options = max(0, len(run.formats) - 1)
    alternatives = len(recipe.transform_candidates) + options
    layers = sum(x.nbytes(plan.bins) for x in plan.quantized())
    layers += alternatives * sum(x.nbytes(plan.bins) for x in plan.gemm())
    return statistics + max(min(statistics, run.memory or statistics), layers + output)
