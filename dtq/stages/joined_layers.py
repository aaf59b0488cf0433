# SPDX-License-Identifier: Apache-2.0
"""Linears that another engine keeps as one matrix are solved as one where their format needs it.

Some formats have numbers for a whole matrix, their ``matrix_tensors``: the table of
``lut4-2l-g16``, the float32 scale of ``nvfp4``. The engine has one of them for q, k and v together,
so they are found together; so is the format, where a plan has several candidates. All else is per
row, and the rows of a solver do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dtq.formats import FORMATS, PackedTensors
from dtq.plan.layers import LayerPlan
from dtq.stages.layer_result import LayerReport, LayerResult
from dtq.stages.solve_layer import TransformedInput, solve_layer


def solve_joined(
    layers: list[LayerPlan], weights: list[Tensor], x: TransformedInput
) -> list[LayerResult]:
    """Quantize linears as the rows of one matrix; each gets its own rows of the result.

    Args:
        layers: their plans, equal but for names, roles and rows.
        weights: float (N, K) of each.
        x: their input.
    """
    rows = [len(w) for w in weights]
    whole = replace(layers[0], shape=(sum(rows), layers[0].shape[1]))
    x = replace(x, gradients=lambda _: ())  # between layers there are none
    solved = solve_layer(whole, torch.cat(weights), x)
    tensors = [_rows(solved.tensors, sum(rows), start, n) for start, n in _spans(rows)]
    shifts: list[Tensor | None] = [None] * len(rows)
    if solved.bias_shift is not None:
        shifts = list(solved.bias_shift.split(rows))
    results = []
    for layer, w, packed, shift in zip(layers, weights, tensors, shifts, strict=True):
        fmt = FORMATS[solved.plan.weight_format]
        w_q = fmt.unpack({name: packed[name] for name in fmt.tensor_specs(layer.shape)})
        plan = replace(solved.plan, name=layer.name, role=layer.role, shape=layer.shape)
        report = LayerReport(
            layer.name, layer.role, plan.weight_format, plan.bits(), x.choice.label,
            x.output_error(w, w_q, None, shift),
        )  # fmt: skip
        weight_error = float((x.transform.w(w) - w_q).square().sum())
        results.append(LayerResult(plan, packed, solved.transform, shift, report, weight_error))
    return results


def joined_groups(layers: list[LayerPlan], joined: Mapping[str, str]) -> list[list[int]]:
    """Places of the linears to solve together; most are alone.

    Args:
        layers: linears that share an input and its transform.
        joined: name of the engine's matrix, for layers whose rows are a part of one.
    """
    groups: dict[object, list[int]] = {}
    for i, layer in enumerate(layers):
        key: object = i
        if layer.name in joined and _is_one_problem(layer):
            alike = layer.spec, layer.solver, layer.format_candidates
            key = joined[layer.name], alike
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def names_in_one_matrix(name: str, joined: Mapping[str, str]) -> list[str]:
    """The layers whose rows the engine has in one matrix with those of a layer, which is first.

    Args:
        name: of the layer.
        joined: as for :func:`joined_groups`.
    """
    return [name, *(x for x in joined if x != name and joined[x] == joined.get(name))]


def _is_one_problem(layer: LayerPlan) -> bool:
    """Whether the rows of a layer cannot be quantized apart from the others of their matrix."""
    if layer.lowrank.name != "none":
        return False  # each layer has its own branch, and its residual is another matrix
    if layer.format_candidates:
        return True  # the matrix has one of them
    return bool(FORMATS[layer.weight_format].matrix_tensors)


def _spans(rows: list[int]) -> list[tuple[int, int]]:
    starts = [sum(rows[:i]) for i in range(len(rows))]
    return list(zip(starts, rows, strict=True))


def _rows(tensors: PackedTensors, total: int, start: int, rows: int) -> PackedTensors:
    """Rows of packed tensors; copies, as files refuse tensors that share memory."""
    return {
        name: (t[start : start + rows] if t.shape[0] == total else t).clone()
        for name, t in tensors.items()
    }
