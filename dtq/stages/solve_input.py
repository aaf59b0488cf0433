# SPDX-License-Identifier: Apache-2.0
"""Quantize the linears of one input group from its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from dtq.formats import FORMATS
from dtq.io.schema import MethodSpec
from dtq.plan.layers import LayerPlan
from dtq.solvers.lowrank import LOWRANK, LowRankBranch
from dtq.stages.joined_layers import joined_groups, solve_joined
from dtq.stages.layer_result import LayerResult
from dtq.stages.solve_layer import TransformedInput, solve_layer


def solve_input_group(
    layers: list[LayerPlan],
    weights: list[Tensor],
    x: TransformedInput,
    joined: Mapping[str, str],
) -> list[LayerResult]:
    """Quantize linears that share an input under the chosen transform, and under its runner-ups.

    The transform search compares with plain rounding; what counts is the error after the solver.

    Args:
        layers: their plans.
        weights: float (N, K) of each.
        x: their input under the chosen transform.
        joined: the matrix of another engine that a layer's rows are a part of, by layer.

    Returns:
        Results under the transform with the lowest sum of output errors.
    """
    attempts = []
    for choice in (x.choice, *x.choice.runner_ups):
        each = replace(x, choice=choice, factors={})
        branches = _branches(layers, weights, each)
        results: dict[int, LayerResult] = {}
        for places in joined_groups(layers, joined):
            if len(places) == 1:
                (i,) = places
                results[i] = solve_layer(layers[i], weights[i], each, branches[i])
                continue
            together = [layers[i] for i in places], [weights[i] for i in places]
            results |= zip(places, solve_joined(*together, each), strict=True)
        attempts.append([results[i] for i in range(len(layers))])
    return min(attempts, key=lambda results: sum(r.report.error or 0.0 for r in results))


def _branches(
    layers: list[LayerPlan], weights: list[Tensor], x: TransformedInput
) -> list[LowRankBranch | None]:
    """The low-rank branch of each linear, None where the plan has none."""
    branches: list[LowRankBranch | None] = [None] * len(layers)
    alike: dict[tuple[MethodSpec, str], list[int]] = {}
    for i, layer in enumerate(layers):
        if layer.lowrank.name != "none":
            alike.setdefault((layer.lowrank, layer.weight_format), []).append(i)
    for (method, fmt), same in alike.items():
        targets = [x.transform.w(weights[i]) for i in same]
        solved = LOWRANK[method.name].call(targets, FORMATS[fmt], x.hessian, **dict(method.knobs))
        for i, branch in zip(same, solved, strict=True):
            branches[i] = branch
    return branches
