# SPDX-License-Identifier: Apache-2.0
"""Stage: for each input group choose a transform, then quantize the weights that read it."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from dtq.calibrate.observers import InputStats
from dtq.io.memory import Mapped, trim_malloc
from dtq.models import InputGroup
from dtq.models.linears import matrix_of
from dtq.nn.linear import QuantLinear
from dtq.plan.layers import LayerPlan, Plan
from dtq.solvers.finite import check
from dtq.stages.layer_result import InputReport, LayerResult, from_result, to_result
from dtq.stages.run import Run
from dtq.stages.solve_input import solve_input_group
from dtq.stages.solve_layer import TransformedInput
from dtq.stages.transform_choice import choose_transform, groups_sharing_transform, input_report

COPIES = 8
"""Float32 matrices of a layer's size that its solver holds."""

_TRIM_AFTER = 2**20  # weights; malloc walks through all that is free: not after every small layer


def solve(run: Run) -> None:
    """Quantize every layer of the plan; the float model is not changed."""
    names = {x.name for x in run.plan.quantized()}
    run.results, run.report.inputs = solve_layers(run, run.plan, names, "quantize")


def solve_layers(
    run: Run, plan: Plan, names: Collection[str], label: str
) -> tuple[dict[str, LayerResult], list[InputReport]]:
    """Quantize some layers, one input group at a time.

    Args:
        run: the float model and its statistics.
        plan: formats and methods, of ``run`` or an alternative to it.
        names: the layers.
        label: of the progress bar; the linears that share a transform are a task named after it.

    Returns:
        Results by layer name, and a report for each input group.
    """
    problems: dict[str, tuple[InputGroup, list[LayerPlan]]] = {}
    for group in run.scan.input_groups:
        for i, sharing in enumerate(groups_sharing_transform(group, plan)):
            if layers := [x for x in sharing if x.name in names]:
                problems[f"{label}/{group.name}.{i}"] = group, layers
    costs = {task: _cost(layers) for task, (_, layers) in problems.items()}
    assigned = run.tasks.assigned(costs)
    mapped, untrimmed = Mapped(), 0
    # by cost, so that the remaining time is right where layers differ in size
    total = sum(costs[task] for task in assigned)
    shown = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with run.progress_bar(label, total=total, bar_format=shown) as bar:
        for done, task in enumerate(assigned, 1):
            group, layers = problems[task]
            modules = [run.model.get_submodule(layer.name) for layer in layers]
            weights = [matrix_of(module) for module in modules]
            run.tasks.save(task, *_solve_group(run, group, layers, weights))
            mapped.release(module.weight for module in modules)  # type: ignore[misc]
            bar.set_postfix_str(f"{done} of {len(assigned)} input groups", refresh=False)
            bar.update(costs[task])
            untrimmed += sum(w.numel() for w in weights)
            if untrimmed >= _TRIM_AFTER:
                untrimmed = 0
                # not what the solver of such layers may soon take again
                trim_malloc(beyond=COPIES // 2 * 4 * max(w.numel() for w in weights))
    run.tasks.barrier()
    solved = [from_result(*run.tasks.load(task), plan) for task in problems]
    by_name = {result.plan.name: result for results, _ in solved for result in results}
    return by_name, [report for _, report in solved]


def _solve_group(
    run: Run, group: InputGroup, layers: list[LayerPlan], weights: list[Tensor]
) -> tuple[dict[str, Tensor], object]:
    """Linears that share a transform, as the result of a task."""
    stats = run.stats(group.name)
    sums, where = _sums(stats)
    for layer, w in zip(layers, weights, strict=True):
        check(w, *sums, layer=f"{layer.name}{where}")
    choice = choose_transform(layers, weights, stats)
    x = TransformedInput.of(run, layers[0], choice, weights[0])
    results = solve_input_group(layers, weights, x, run.joined)
    return to_result(results, input_report(group, stats, choice, results[0].transform))


def _sums(stats: InputStats | None) -> tuple[list[Tensor], str]:
    """Sums over the input, which are not finite if an input was not, and words for where."""
    if stats is None:
        return [], ""
    finite = stats.channels.total.isfinite().all(1).tolist()
    bad = ", ".join(str(b + 1) for b, good in enumerate(finite) if not good)
    sums = [x.total for x in (stats.channels, stats.hessian) if x is not None]
    return sums, f": in timestep bins {bad} of {len(finite)}" if bad else ""


def _cost(layers: list[LayerPlan]) -> float:
    """In proportion to the solver's time: GPTQ takes columns times weights."""
    return sum(math.prod(x.shape) * x.shape[1] for x in layers)


def build_quant_linear(
    result: LayerResult, old: nn.Module, bins: int, compute_dtype: torch.dtype
) -> QuantLinear:
    """The quantized linear for the place of a float one, or of a 1 x 1 convolution.

    Args:
        result: the solved layer.
        old: the float module; its device, bias and training mode carry over.
        bins: timestep bins of static activation scales.
        compute_dtype: dtype of the bias and of the output.
    """
    spec, device = result.plan.spec, next(old.parameters()).device
    new = QuantLinear.in_place_of(old, spec, bins=bins, compute_dtype=compute_dtype, device="meta")
    new.fill({name: tensor.to(device) for name, tensor in result.tensors.items()})
    if isinstance(old.bias, Tensor):
        shift = 0.0 if result.bias_shift is None else result.bias_shift
        bias = (old.bias.detach().float() + shift).to(compute_dtype)
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new.train(old.training)
