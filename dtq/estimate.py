# SPDX-License-Identifier: Apache-2.0
"""What quantizing will cost, before any of it is done: file size, memory, time."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from torch import nn

from dtq import look
from dtq.allocate import parse_budget
from dtq.budget import JUDGES, RECORDED
from dtq.calibrate.engine import made_up_calls, portions
from dtq.calibrate.stats import GRAM_ROWS, SiteStats
from dtq.checkpoint import predicted_bytes
from dtq.families import Scan, blocks_of
from dtq.plan import Call, Plan
from dtq.probe import kind, paces
from dtq.recipe import Recipe
from dtq.solve import COPIES
from dtq.solvers.gptq import factor_cost

_TRACED_BATCH = 2  # pictures in the traced forward, see source._call_once
_STEPS = 50  # of a sampler, where the recipe leaves them to the pipeline
_FORWARD = 1.3  # time of a model's products over that of its linears at the rate of a large one
_TOUCHED = 12  # passes over what goes into and comes out of linears: norms, copies, statistics
_LOOKED = 1.3  # time of a call of the last look over that of another: layers are compared in it


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
    spare = max(0.0, recipe.guard.budget - plan.bits(plan.gemm())) if recipe.guard.to else 0.0
    most = file + round(spare * gemm / 8)
    if recipe.allocate.budget:
        allowed = parse_budget(str(recipe.allocate.budget), gemm)
        most = file - sum(x.nbytes(plan.bins) for x in plan.gemm()) + allowed
    floats = sum(t.numel() * dtype.itemsize for t in model.state_dict().values())
    runs = _runs(model, recipe, driven)
    if not driven:
        recipe = replace(recipe, compare=())
        runs = runs if needs else replace(runs, looked=0)  # nothing to look with
    disk = disk_needed(scan, plan, recipe, needs, most, memory)
    return Estimate(
        file,
        most,
        floats,
        peak_memory(
            model,
            scan,
            plan,
            needs,
            dtype,
            bins=recipe.calibration.bins,
            memory=memory,
            mapped=mapped,
        ),
        disk,
        _seconds(scan, plan, recipe, needs, runs, memory, dtype, reading) if scan.traced else None,
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
    for site in scan.sites:
        counts = [math.prod(plan[x.name].shape) for x in site.linears if not plan[x.name].kept]
        if not counts:
            continue
        seen = SiteStats.nbytes(site.columns, bins, needs) if needs else 0
        statistics += seen
        # the weights of the site, and what is made of one of them on the way to its codes
        solving = 4 * sum(counts) + COPIES * 4 * max(counts) + seen
        if "gram" in needs:  # it is rotated in float32, and factored
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
    kept = [s for s in scan.sites if any(not plan[x.name].kept for x in s.linears)]
    seen = sum(SiteStats.nbytes(s.columns, recipe.calibration.bins, needs) for s in kept)
    seen = seen if needs else 0
    options = len(recipe.allocate.options) - 1 if recipe.allocate.budget else 0
    units = sum(x.nbytes(plan.bins) for x in plan.quantized())
    others = sum(x.nbytes(plan.bins) for x in plan.gemm()) * (len(recipe.compare) + options)
    return seen + max(min(seen, memory or seen), units + others + written)


@dataclass(frozen=True)
class _Runs:
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


def _runs(model: nn.Module, recipe: Recipe, driven: bool) -> _Runs:
    c = recipe.calibration
    batches, steps = -(-c.samples // c.batch), c.steps or _STEPS
    if not driven:
        looked = 2 * made_up_calls(look.short(recipe))
        return _Runs(made_up_calls(c), c.batch, steps, 1, looked)
    distilled = bool(getattr(getattr(model, "config", None), "guidance_embeds", False))
    branches = 1 if distilled or 0 < c.guidance <= 1 else 2
    looked = 3 * branches * min(steps, look.STEPS)
    pictures = branches * min(c.batch, c.samples)
    return _Runs(batches * steps, pictures, steps, branches, looked)


def _seconds(
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    needs: frozenset[str],
    runs: _Runs,
    memory: int | None,
    dtype: torch.dtype,
    reading: float,
) -> float:
    rate, shapes = _multiply_rate(torch.float32), {x.name: x.shape for x in scan.linears()}
    flops = sum(2 * rows * math.prod(shapes[n]) for n, rows in scan.rows.items())
    touched = sum(rows * sum(shapes[n]) for n, rows in scan.rows.items())
    picture = _FORWARD * flops / _multiply_rate(dtype) + _TOUCHED * touched * _touch()
    picture /= _TRACED_BATCH

    def forward(pictures: int) -> float:
        return pictures * picture + reading

    looks = runs.looked // runs.branches
    total = looks * _LOOKED * forward(runs.branches)
    total += forward(_TRACED_BATCH) + 2 * reading  # traced, hashed, solved
    if needs:
        sites = [s for s in scan.sites if any(not plan[x.name].kept for x in s.linears)]
        room = memory or psutil.virtual_memory().available // 2
        passes = len(portions(sites, recipe.calibration.bins, needs, room))
        total += passes * runs.calls * forward(runs.pictures)
        if "gram" in needs:
            counted = runs.calls * min(GRAM_ROWS, runs.pictures * _rows(scan))
            total += counted * sum(2 * s.columns**2 for s in sites) / rate
    versions = [plan.quantized()]
    for other in recipe.compare:
        versions.append([replace(x, transform=Call(other)) for x in plan.gemm()])
    for option in recipe.allocate.options if recipe.allocate.budget else ():
        versions.append([replace(x, weights=option) for x in plan.gemm() if x.weights != option])
    layers = [layer for version in versions for layer in version]
    sampled = runs.calls * runs.pictures * _rows(scan)
    known = paces(layers, recipe, needs, rate, sampled)
    readers = {x.name: len(s.linears) for s in scan.sites for x in s.linears}
    total += sum(
        known[kind(x)].seconds(x.shape, rate, "gram" in needs, readers[x.name]) for x in layers
    )
    refined = recipe.refine.name != "none"
    if recipe.compare or recipe.allocate.budget or recipe.steps.modes or refined:
        total += runs.steps * forward(RECORDED * runs.branches)
    call = forward(RECORDED * runs.branches)
    total += (1 + len(recipe.compare)) * JUDGES * call if recipe.compare else 0.0
    if recipe.allocate.budget:
        judged = sum(any(not plan[x.name].kept for x in s.linears) for s in scan.sites)
        total += judged * len(recipe.allocate.options) * recipe.allocate.calls * call
    if refined:
        blocks = len({x.name.split(".")[1] for x in plan.gemm() if "." in x.name})
        # a step trains one block, three times its forward; inputs are captured block by block
        total += (3 * dict(recipe.refine.knobs).get("steps", 100) + 40 * blocks) * call
    return total


def _rows(scan: Scan) -> int:
    """Of a picture, in most linears."""
    return statistics.mode(scan.rows.values()) // _TRACED_BATCH


def _multiply_rate(dtype: torch.dtype) -> float:
    """Floating point operations per second of a product on this machine."""
    a = torch.randn(768, 768).to(dtype)
    return 2 * 768**3 / _fastest(lambda: a @ a)


def _touch() -> float:
    """Seconds of a pass over a tensor, by element."""
    a = torch.randn(512, 2048)
    return _fastest(lambda: a.abs().amax(0)) / a.numel()


def _fastest(work: Callable[[], object]) -> float:
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
