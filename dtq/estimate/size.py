# SPDX-License-Identifier: Apache-2.0
"""What quantizing will cost, before any of it is done: file size, memory, time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import psutil
import torch
from torch import nn

from dtq.allocate import parse_budget
from dtq.calibrate.observers import InputStats
from dtq.checkpoint.reader import predicted_bytes
from dtq.estimate.duration import runs_of, seconds
from dtq.linalg.cholesky import factor_cost
from dtq.models import Scan, blocks_of
from dtq.plan.layers import Plan
from dtq.recipe.resolve import Recipe
from dtq.stages.solve import COPIES


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, time in seconds.

    Attributes:
        file: exact size of the transformer's safetensors file when nothing is promoted.
        file_most: with the whole budget spent, the guard's or that of mixed precision.
        float_file: of the float transformer in the compute dtype.
        memory: peak while quantizing, see :func:`peak_memory`.
        disk: peak while quantizing, the output included, see :func:`disk_needed`.
        seconds: on this machine, None when the model could not be traced.
    """

    file: int
    file_most: int
    float_file: int
    memory: int
    disk: int
    seconds: float | None


def estimate(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    needs: frozenset[str] | None = None,
    memory: int | None = None,
    mapped: bool = False,
    driven: bool = True,
    reading: float = 0.0,
) -> Estimate:
    """Work out the cost of a plan, carried out by the command line.

    Args:
        model: the float transformer; the meta device will do.
        scan: its linears.
        plan: what happens to them.
        recipe: for its calibration and guard.
        dtype: compute dtype, that of every kept tensor.
        needs: statistics that are collected; default: what the recipe asks for.
        memory, mapped: see :func:`peak_memory`.
        driven: whether a pipeline runs the model; a bare transformer gets a few made-up calls, and
            no alternatives are compared on them.
        reading: seconds to read the model's files once, which every call of a mapped model does.
    """
    needs = recipe.needs() if needs is None else needs
    tensors = file_tensors(model, plan, dtype)
    file = predicted_bytes(tensors)
    gemm = sum(math.prod(x.shape) for x in plan.gemm())
    spare = max(0.0, recipe.promote.budget - plan.bits(plan.gemm())) if recipe.promote.to else 0.0
    most = file + round(spare * gemm / 8)
    if recipe.allocate.budget:
        allowed = parse_budget(str(recipe.allocate.budget), gemm)
        most = file - sum(x.nbytes(plan.bins) for x in plan.gemm()) + allowed
    floats = sum(t.numel() * dtype.itemsize for t in model.state_dict().values())
    runs = runs_of(model, recipe, driven)
    if not driven:
        recipe = replace(recipe, transform_candidates=())
        runs = runs if needs else replace(runs, looked=0)  # nothing to look with
    time = None
    if scan.traced:
        time = seconds(scan, plan, recipe, needs, runs, dtype, memory=memory, reading=reading)
    bins = recipe.calibration.num_timestep_bins
    return Estimate(
        file,
        most,
        floats,
        peak_memory(model, scan, plan, needs, dtype, bins=bins, memory=memory, mapped=mapped),
        disk_needed(scan, plan, recipe, needs, most, memory),
        time,
    )


def file_tensors(
    model: nn.Module, plan: Plan, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor that the quantized file will hold."""
    wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    tensors = {}
    for key, tensor in model.state_dict().items():
        kept = torch.float32 if any(part in wide for part in key.split(".")) else dtype
        tensors[key] = (tuple(tensor.shape), kept if tensor.is_floating_point() else tensor.dtype)
    for layer in plan.quantized():
        for part, spec in layer.spec.tensor_specs(layer.shape, plan.bins).items():
            tensors[f"{layer.name}.{part}"] = (spec.shape, spec.dtype)
    return tensors


def peak_memory(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    needs: frozenset[str],
    dtype: torch.dtype,
    *,
    bins: int = 1,
    memory: int | None = None,
    mapped: bool = False,
) -> int:
    """Bytes at the peak, in this process.

    The process itself, the float model, and the largest of what is there one after another: the
    statistics; the work on the linears of one input; the quantized model, as it is written. Of a
    mapped model one block at a time is resident, and what lies outside of blocks. Activations are
    not counted.

    Args:
        model: the float transformer; the meta device will do.
        scan: its linears.
        plan: what happens to it.
        needs: statistics that are collected.
        dtype: compute dtype.
        bins: timestep bins of the statistics.
        memory: most bytes of statistics.
        mapped: whether the file has that dtype, so that it is mapped and not read.
    """
    statistics, working = 0, 0
    for site in scan.input_groups:
        counts = [
            math.prod(plan[x.name].shape) for x in site.linears if not plan[x.name].unquantized
        ]
        if not counts:
            continue
        seen = InputStats.nbytes(site.columns, bins, needs) if needs else 0
        statistics += seen
        # the weights of the site, and what is made of one of them on the way to its codes
        solving = 4 * sum(counts) + COPIES * 4 * max(counts) + seen
        if "hessian" in needs:  # it is rotated in float32, and factored
            solving += 2 * 4 * site.columns**2 + factor_cost(site.columns)[0]
        working = max(working, solving)
    floats: Counter[str] = Counter()
    blocks = blocks_of(model)
    for name, tensor in model.state_dict().items():
        home = next((prefix for prefix in blocks if name.startswith(prefix)), "")
        floats[home] += tensor.numel() * dtype.itemsize
    outside = floats.pop("", 0)
    resident = outside + (max(floats.values(), default=0) if mapped else floats.total())
    done = sum(x.nbytes(plan.bins) for x in plan.quantized())
    here = psutil.Process().memory_info().rss
    return here + resident + max(min(statistics, memory or statistics), working, done)


def disk_needed(
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    needs: frozenset[str],
    written: int,
    memory: int | None = None,
) -> int:
    """Bytes on disk at the peak: statistics, solved units of every alternative, the output.

    Args:
        scan, plan, recipe: what happens.
        needs: statistics that are collected.
        written: of the output.
        memory: most bytes of statistics in memory; a file with them is replaced by the next.
    """
    kept = [s for s in scan.input_groups if any(not plan[x.name].unquantized for x in s.linears)]
    seen = sum(
        InputStats.nbytes(s.columns, recipe.calibration.num_timestep_bins, needs) for s in kept
    )
    seen = seen if needs else 0
    options = len(recipe.allocate.formats) - 1 if recipe.allocate.budget else 0
    units = sum(x.nbytes(plan.bins) for x in plan.quantized())
    others = sum(x.nbytes(plan.bins) for x in plan.gemm()) * (
        len(recipe.transform_candidates) + options
    )
    return seen + max(min(seen, memory or seen), units + others + written)
