# SPDX-License-Identifier: Apache-2.0
"""Stage: for each input group choose a transform, then quantize the weights that read it."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from dtq.calibrate.observers import InputStats
from dtq.formats import FORMATS
from dtq.io.memory import Mapped, trim_malloc
from dtq.models import InputGroup
from dtq.models.linears import is_linear, matrix_of
from dtq.nn.conv import QuantConv
from dtq.nn.embedding import QuantEmbedding
from dtq.nn.linear import QuantLinear
from dtq.nn.weight_only import WeightOnly
from dtq.plan.layers import LayerPlan, Plan
from dtq.runs.tasks import Result
from dtq.solvers import SOLVERS
from dtq.solvers.finite import check
from dtq.stages.layer_result import InputReport, LayerReport, LayerResult, from_result, to_result
from dtq.stages.run import Run
from dtq.stages.solve_input import solve_input_group
from dtq.stages.solve_layer import TransformedInput
from dtq.stages.transform_choice import choose_transform, groups_sharing_transform, input_report
from dtq.transforms import OnlineTransform

COPIES = 8
"""Float32 matrices of a layer's size that its solver holds."""

_ROUNDED_AT_ONCE = 2**22  # weights of a convolution or a table

_TRIM_AFTER = 2**20  # weights; malloc walks through all that is free: not after every small layer


def solve(run: Run) -> None:
    """Quantize every layer of the plan; the float model is not changed."""
    names = {x.name for x in run.plan.quantized()}
    run.results, run.report.inputs = solve_layers(run, run.plan, names, "quantize")
    without_data = (*run.plan.convolutions(), *run.plan.tables())
    run.results |= {layer.name: _rounded(run, layer) for layer in without_data}


def _rounded(run: Run, layer: LayerPlan) -> LayerResult:
    """A convolution or a table of embeddings, whose solver needs no data; a task.

    Its rows share no parameters, so that a part of them at a time is float32.
    """

    def compute() -> Result:
        weight = run.model.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        fmt, solver = FORMATS[layer.weight_format], SOLVERS[layer.solver.name].call
        packed, error = [], 0.0
        for part in weight.detach().split(max(1, _ROUNDED_AT_ONCE // layer.shape[1])):
            rows = part.float().flatten(1)
            check(rows, layer=layer.name)
            rounded, params = solver(rows, fmt, None, **dict(layer.solver.knobs))
            error += float((rounded - rows).square().sum())
            packed.append(fmt.pack(rows, params))
        tensors = {name: torch.cat([part[name] for part in packed]) for name in packed[0]}
        report = LayerReport(layer.name, layer.role, layer.weight_format, layer.bits(), "none")
        transform = OnlineTransform(torch.ones(layer.shape[1], dtype=torch.bfloat16), 1)
        result = LayerResult(layer, tensors, transform, None, report, error)
        return to_result([result], InputReport(layer.name))

    tensors, data = run.tasks.get_or_compute(f"{layer.role}/{layer.name}", compute)
    (result,), _ = from_result(tensors, data, run.plan)
    return result


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


def build_quantized(
    result: LayerResult, old: nn.Module, bins: int, compute_dtype: torch.dtype
) -> QuantLinear | WeightOnly:
    """The quantized layer for the place of a float linear, convolution or table.

    Args:
        result: the solved layer.
        old: the float module; its device, bias and training mode carry over.
        bins: timestep bins of static activation scales.
        compute_dtype: dtype of the bias and of the output.
    """
    if is_linear(old):
        return build_quant_linear(result, old, bins, compute_dtype)
    spec, device = result.plan.spec, next(old.parameters()).device
    kind = QuantEmbedding if isinstance(old, nn.Embedding) else QuantConv
    new = kind.in_place_of(old, spec, compute_dtype=compute_dtype, device="meta")
    new.fill({name: tensor.to(device) for name, tensor in result.tensors.items()})
    return new


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
