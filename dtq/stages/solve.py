# SPDX-License-Identifier: Apache-2.0
"""One input at a time: choose its transform, round the weights that read it, say how that went."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dtq.calibrate.collection import Statistics
from dtq.calibrate.observers import InputStats
from dtq.io.memory import Mapped, trim_malloc
from dtq.models import InputGroup, Scan
from dtq.models.linears import matrix_of
from dtq.nn.linear import QuantLinear
from dtq.plan.layers import LayerPlan, Plan
from dtq.recipe.resolve import Recipe
from dtq.runs.tasks import TaskStore
from dtq.solvers.finite import check
from dtq.stages.layer_result import InputReport, LayerResult, from_result, to_result
from dtq.stages.solve_layer import solve_input_group
from dtq.stages.transform_choice import choose_transform, groups_sharing_transform, input_report

COPIES = 8
"""Float32 matrices of a layer's size that its solver holds."""


def _moments(stats: InputStats | None) -> list[Tensor]:
    """Sums over the input that turn NaN or infinite where it was."""
    if stats is None:
        return []
    return [stats.channels.total, *([] if stats.hessian is None else [stats.hessian.hessian])]


def _broken_bins(stats: InputStats | None) -> str:
    """Where in the trajectory the input was not finite, for messages."""
    good = [] if stats is None else stats.channels.total.isfinite().all(1).tolist()
    bad = [str(b + 1) for b, fine in enumerate(good) if not fine]
    return f": in timestep bins {', '.join(bad)} of {len(good)}" if bad else ""


def solve_all(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    *,
    only: Collection[str] | None = None,
    what: str = "quantize",
    progress: bool = True,
    tasks: TaskStore | None = None,
) -> tuple[dict[str, LayerResult], list[InputReport]]:
    """Solve every quantized layer, or those named in ``only``, site by site.

    The linears that share a transform are a unit of ``work``, named after ``what``.
    """
    tasks = tasks or TaskStore()
    wanted = {x.name for x in plan.quantized()}
    wanted &= wanted if only is None else set(only)
    jobs: dict[str, tuple[InputGroup, list[LayerPlan]]] = {}
    for site in scan.input_groups:
        for i, group in enumerate(groups_sharing_transform(site, plan)):
            if members := [x for x in group if x.name in wanted]:
                jobs[f"{what}/{site.name}.{i}"] = site, members
    todo = tasks.assigned({unit: _cost(members) for unit, (_, members) in jobs.items()})
    mapped = Mapped()
    with tqdm(
        total=sum(len(jobs[unit][1]) for unit in todo),
        desc=what, unit="layer", disable=not progress, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for unit in todo:
            site, members = jobs[unit]
            stats = statistics.inputs.get(site.name) if statistics else None
            weights = [matrix_of(model.get_submodule(layer.name)) for layer in members]
            for layer, w in zip(members, weights, strict=True):
                check(w, *_moments(stats), layer=f"{layer.name}{_broken_bins(stats)}")
            choice = choose_transform(members, weights, stats)
            best = solve_input_group(members, weights, choice, stats, recipe)
            mapped.release(model.get_submodule(layer.name).weight for layer in members)  # type: ignore[misc]
            tasks.save(unit, *to_result(best, input_report(site, stats, choice, best[0].transform)))
            bar.update(len(members))
            trim_memory(weights)
    tasks.barrier()
    found = [from_result(*tasks.load(unit), plan) for unit in jobs]
    solved = {result.plan.name: result for results, _ in found for result in results}
    return solved, [report for _, report in found]


def trim_memory(weights: list[Tensor]) -> None:
    """Give back memory, but for half of what solving such layers takes: more are to come."""
    trim_malloc(beyond=COPIES // 2 * 4 * max(w.numel() for w in weights))


def _cost(members: list[LayerPlan]) -> float:
    """In proportion to the time it takes: GPTQ is columns times weights."""
    return sum(math.prod(x.shape) * x.shape[1] for x in members)


def build_quant_linear(
    result: LayerResult, old: nn.Module, bins: int, compute_dtype: torch.dtype
) -> QuantLinear:
    """The quantized linear that stands in for a float one, or for a 1 x 1 convolution."""
    new = QuantLinear.in_place_of(
        old, result.plan.spec(), bins=bins, compute_dtype=compute_dtype, device="meta"
    )
    device = next(old.parameters()).device
    new.fill({name: part.to(device) for name, part in result.tensors.items()})
    if isinstance(old.bias, Tensor):
        shift = 0.0 if result.bias_shift is None else result.bias_shift
        bias = (old.bias.detach().float() + shift).to(compute_dtype)
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new.train(old.training)
