# SPDX-License-Identifier: Apache-2.0
"""Quantize one input group, or one layer, from its statistics."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from dtq.calibrate.observers import InputStats
from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS, fake_quantize, row_scale
from dtq.plan.layers import LayerPlan
from dtq.recipe.resolve import Recipe
from dtq.solvers import SOLVERS
from dtq.solvers.lowrank import LOWRANK, LowRankBranch
from dtq.stages.layer_result import LayerReport, LayerResult
from dtq.transforms import OnlineTransform, TransformChoice


class _TransformedInput:
    """What calibration keeps of one input, under one transform: worked out once for its readers."""

    def __init__(
        self, stats: InputStats | None, choice: TransformChoice, acts: str, like: Tensor
    ) -> None:
        self.stats, self.transform = stats, choice.transform
        self.acts, self.like = ACTIVATION_FORMATS[acts], like
        self.factors: dict[float, Tensor] = {}  # of the hessian, see gptq

    @cached_property
    def hessian(self) -> Tensor | None:
        """Second moment (K, K) of the changed input, None without calibration."""
        if self.stats is None or self.stats.hessian is None:
            return None
        return self.transform.hessian(self.stats.hessian.second_moment().to(self.like))

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Sampled rows (R, K): as they are, changed, and rounded as the layer multiplies them."""
        if self.stats is None or self.stats.sample is None:
            return None
        x = self.stats.sample.rows.to(self.like)
        changed = self.transform.x(x)
        return x, changed, fake_quantize(changed, self.acts)


def solve_input_group(
    members: list[LayerPlan],
    weights: list[Tensor],
    choice: TransformChoice,
    stats: InputStats | None,
    recipe: Recipe,
) -> list[LayerResult]:
    """Solve the linears of a site under the chosen transform, and under its close rivals.

    The search judges with plain rounding; what counts is the error after the solver.
    """
    tries = []
    for each in (choice, *choice.runner_ups):
        seen = _TransformedInput(stats, each, members[0].activation_format, weights[0])
        branches = _branches(members, weights, each, seen)
        jobs = zip(members, weights, branches, strict=True)
        tries.append(
            [solve_layer(layer, w, each, stats, recipe, low, seen) for layer, w, low in jobs]
        )
    return min(tries, key=lambda results: sum(r.report.error or 0.0 for r in results))


def solve_layer(
    layer: LayerPlan,
    weight: Tensor,
    choice: TransformChoice,
    stats: InputStats | None,
    recipe: Recipe,
    branch: LowRankBranch | None = None,
    seen: _TransformedInput | None = None,
) -> LayerResult:
    """One linear: change its weight, split it, round the rest, measure, correct its mean.

    Where the plan gives several formats to choose from, all are solved and the one with the least
    output error (without rows to measure on: weight error) stays.
    """
    seen = seen or _TransformedInput(stats, choice, layer.activation_format, weight)
    names = layer.format_candidates or (layer.weight_format,)
    tries = [
        _solve_in(replace(layer, weight_format=n), weight, choice, seen, recipe, branch)
        for n in names
    ]
    return min(tries, key=lambda r: (r.report.error or 0.0, r.weight_error))


def _solve_in(
    layer: LayerPlan,
    weight: Tensor,
    choice: TransformChoice,
    seen: _TransformedInput,
    recipe: Recipe,
    branch: LowRankBranch | None,
) -> LayerResult:
    transform, stats, fmt = choice.transform, seen.stats, FORMATS[layer.weight_format]
    changed = transform.w(weight)
    low: Tensor | None = None
    parts = {}
    if branch is not None:
        # what runs is the rounded branch on the raw input; the residual is what that leaves
        raw = transform.raw(branch.down).bfloat16()
        parts = {"proj_down": raw, "proj_up": branch.up.bfloat16()}
        low = parts["proj_up"].to(changed) @ transform.w(raw.to(changed))
        changed = changed - low
    solver = SOLVERS[layer.solver.name]
    given = (seen.hessian, seen.factors) if solver.shares else (seen.hessian,)
    w_q, params = solver.call(changed, fmt, *given, **dict(layer.solver.knobs))
    shift = None
    if recipe.correct_bias and stats is not None:
        mean = transform.x(stats.channels.mean().to(changed))
        shift = (changed - w_q) @ mean
    parts |= fmt.pack(w_q, params)
    if layer.pre_quant:
        # a copy: linears that share a transform must not share memory, safetensors refuses that
        parts["pre_quant_scale"] = transform.scale.reshape(1, -1).clone()
    if transform.perm is not None:
        parts["pre_quant_perm"] = transform.perm.reshape(1, -1).clone()
    if ACTIVATION_FORMATS[layer.activation_format].static:
        parts["input_scale"] = _static_scale(
            transform, stats, ACTIVATION_FORMATS[layer.activation_format].per_timestep
        )
    error = _output_error(weight, w_q, low, shift, seen)
    final = replace(
        layer,
        hadamard_block_size=transform.block,
        num_rotations=transform.num_rotations,
        permutation=transform.perm is not None,
        rank=0 if branch is None else len(branch.down),
    )
    misfit = float((changed - w_q).square().sum())
    report = LayerReport(
        final.name, final.role, final.weight_format, final.bits(), choice.label, error
    )
    return LayerResult(final, parts, transform, shift, report, misfit)


def _branches(
    members: list[LayerPlan],
    weights: list[Tensor],
    choice: TransformChoice,
    seen: _TransformedInput,
) -> list[LowRankBranch | None]:
    """The low-rank branch of each linear of a site, None where the plan wants none."""
    found: list[LowRankBranch | None] = [None] * len(members)
    wanted = [i for i, layer in enumerate(members) if layer.lowrank.name != "none"]
    for key in dict.fromkeys((members[i].lowrank, members[i].weight_format) for i in wanted):
        same = [i for i in wanted if (members[i].lowrank, members[i].weight_format) == key]
        changed = [choice.transform.w(weights[i]) for i in same]
        call = key[0]
        made = LOWRANK[call.name].call(changed, FORMATS[key[1]], seen.hessian, **dict(call.knobs))
        for i, branch in zip(same, made, strict=True):
            found[i] = branch
    return found


def _output_error(
    weight: Tensor,
    w_q: Tensor,
    low: Tensor | None,
    shift: Tensor | None,
    seen: _TransformedInput,
) -> float | None:
    """Relative squared error of the layer's output on sampled rows."""
    if seen.rows is None:
        return None
    x, changed, rounded = seen.rows
    want = x @ weight.T
    got = rounded @ w_q.T
    if low is not None:
        got += changed @ low.T
    if shift is not None:
        got += shift
    return float(got.sub_(want).square_().sum() / want.square_().sum().clamp(min=1e-30))


def _static_scale(transform: OnlineTransform, stats: InputStats | None, stepped: bool) -> Tensor:
    """One activation scale (1, 1), or one per timestep bin (1, bins), from sampled rows."""
    if stats is None or stats.sample is None:
        raise InputError("static activation scales need calibration data")
    rows = transform.x(stats.sample.rows.to(transform.scale.device))
    bins = (stats.sample.stratum // 2).to(rows.device)
    everything = row_scale(rows.reshape(1, -1)).reshape(())
    if not stepped:
        return everything.reshape(1, 1)
    scales = [
        row_scale(rows[bins == b].reshape(1, -1)).reshape(()) if (bins == b).any() else everything
        for b in range(stats.bins)
    ]
    return torch.stack(scales).reshape(1, -1)
