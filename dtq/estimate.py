# SPDX-License-Identifier: Apache-2.0
"""What quantizing will cost, before any of it is done: file size, memory, time."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from dtq.allocate import parse_budget
from dtq.calibrate.stats import SiteStats
from dtq.checkpoint import predicted_bytes
from dtq.families import Scan, blocks_of
from dtq.plan import Plan
from dtq.recipe import Recipe

_TRACED_BATCH = 2  # pictures in the traced forward, see source._call_once


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, time in seconds.

    Attributes:
        file: exact size of the transformer's safetensors file when nothing is promoted.
        file_most: with the whole budget spent, the guard's or that of mixed precision.
        float_file: of the float transformer in the compute dtype.
        memory: peak while quantizing, see :func:`peak_memory`.
        seconds: on this machine, None when the model could not be traced.
    """

    file: int
    file_most: int
    float_file: int
    memory: int
    seconds: float | None


def estimate(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    memory: int | None = None,
    mapped: bool = False,
) -> Estimate:
    """Work out the cost of a plan.

    Args:
        model: the float transformer; the meta device will do.
        scan: its linears.
        plan: what happens to them.
        recipe: for its calibration and guard.
        dtype: compute dtype, that of every kept tensor.
        memory, mapped: see :func:`peak_memory`.
    """
    tensors = file_tensors(model, plan, dtype)
    file = predicted_bytes(tensors)
    gemm = sum(math.prod(x.shape) for x in plan.gemm())
    spare = max(0.0, recipe.guard.budget - plan.bits(plan.gemm())) if recipe.guard.to else 0.0
    most = file + round(spare * gemm / 8)
    if recipe.allocate.budget:
        allowed = parse_budget(str(recipe.allocate.budget), gemm)
        most = file - sum(x.nbytes(plan.bins) for x in plan.gemm()) + allowed
    floats = sum(t.numel() * dtype.itemsize for t in model.state_dict().values())
    return Estimate(
        file,
        most,
        floats,
        peak_memory(model, plan, recipe.needs(), dtype, memory=memory, mapped=mapped),
        _seconds(scan, plan, recipe) if scan.traced else None,
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
        for part, spec in layer.stored(plan.bins).items():
            tensors[f"{layer.name}.{part}"] = (spec.shape, spec.dtype)
    return tensors


def peak_memory(
    model: nn.Module,
    plan: Plan,
    needs: frozenset[str],
    dtype: torch.dtype,
    *,
    memory: int | None = None,
    mapped: bool = False,
) -> int:
    """Bytes at the peak.

    This process, the float model, the statistics, the work on the largest layer, and what is
    quantized already. Of a mapped model one block at a time is resident, and what lies outside of
    blocks. Activations are not counted.

    Args:
        model: the float transformer; the meta device will do.
        plan: what happens to it.
        needs: statistics that are kept.
        dtype: compute dtype.
        memory: most bytes of statistics.
        mapped: whether the file has that dtype, so that it is mapped and not read.
    """
    statistics, columns_seen = 0, 0
    for layer in plan.quantized():  # sites share, so this is an upper bound
        columns = layer.shape[1]
        statistics += SiteStats.nbytes(columns, plan.bins, needs)
        columns_seen = max(columns_seen, columns)
    floats: Counter[str] = Counter()
    blocks = blocks_of(model)
    for name, tensor in model.state_dict().items():
        home = next((prefix for prefix in blocks if name.startswith(prefix)), "")
        floats[home] += tensor.numel() * dtype.itemsize
    outside = floats.pop("", 0)
    resident = outside + (max(floats.values(), default=0) if mapped else floats.total())
    largest = max((math.prod(x.shape) for x in plan.quantized()), default=0)
    done = sum(x.nbytes(plan.bins) for x in plan.quantized())
    here = psutil.Process().memory_info().rss
    working = 6 * 4 * largest + 3 * 8 * columns_seen**2
    return here + resident + min(statistics, memory or statistics) + working + done


def _seconds(scan: Scan, plan: Plan, recipe: Recipe) -> float:
    rate = _multiply_rate()
    shapes = {x.name: x.shape for x in scan.linears()}
    forward = sum(2 * rows * math.prod(shapes[n]) for n, rows in scan.rows.items()) / _TRACED_BATCH
    c = recipe.calibration
    calls = c.samples * (c.steps or 50) * 2  # both branches of guidance
    total = 1.5 * forward * calls / rate if recipe.needs() else 0.0
    for layer in plan.quantized():
        weights, columns = math.prod(layer.shape), layer.shape[1]
        if layer.transform.name == "search":
            total += 100 * (2 * 1024 * weights / rate + 40 * weights / 1e9)
        if layer.solver.name == "gptq":
            tries = 2 if layer.transform.name == "search" else 1  # close rivals are solved too
            total += tries * (4 * weights * columns / rate + columns * 4e-4)
        if layer.lowrank.name != "none":
            rounds = dict(layer.lowrank.knobs).get("iterations", 8) / 2  # most stop early
            total += rounds * 40 * weights * min(layer.shape) / rate
    call = 8 * forward / rate  # four recorded pictures, both branches
    if recipe.allocate.budget:
        sites = sum(any(not plan[x.name].kept for x in s.linears) for s in scan.sites)
        total += sites * len(recipe.allocate.options) * recipe.allocate.calls * call
    if recipe.refine.name != "none":
        blocks = len({x.name.split(".")[1] for x in plan.gemm() if "." in x.name})
        # a step trains one block, three times its forward; inputs are captured block by block
        total += (3 * dict(recipe.refine.knobs).get("steps", 100) + 40 * blocks) * call
    return total


def _multiply_rate() -> float:
    """Floating point operations per second of a float32 product on this machine."""
    a = torch.randn(768, 768)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best
