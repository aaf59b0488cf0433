# SPDX-License-Identifier: Apache-2.0
"""One input at a time: choose its transform, round the weights that read it, say how that went."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dtq.calibrate.stats import SiteStats
from dtq.errors import InputError
from dtq.families import Site
from dtq.formats import FORMATS, Parts
from dtq.formats.acts import ACTS, fake_quantize, row_scale
from dtq.plan import Call, LayerPlan, Plan
from dtq.recipe import Recipe
from dtq.solvers import SOLVERS
from dtq.transforms import TRANSFORMS, Choice, Online


@dataclass
class LayerReport:
    """How one layer came out.

    Attributes:
        error: relative squared error of its output on sampled rows, None without them.
        bits: stored bits per weight.
        transform: what was chosen, in words.
        promoted: the guard raised it; ``error_before`` is why.
    """

    name: str
    role: str
    weights: str
    bits: float
    transform: str
    error: float | None = None
    promoted: bool = False
    error_before: float | None = None


@dataclass
class SiteReport:
    """How one input looks.

    Attributes:
        peaks: largest magnitude per timestep bin over the typical channel's, before.
        peaks_after: the same on sampled rows after the transform.
        candidates: output error of each candidate family of the transform search.
    """

    name: str
    peaks: list[float] = field(default_factory=list)
    peaks_after: list[float] = field(default_factory=list)
    candidates: dict[str, float] = field(default_factory=dict)


@dataclass
class Solved:
    """One layer's result, packed: the float weight stays in the model until the swap."""

    plan: LayerPlan
    parts: Parts
    transform: Online
    bias_shift: Tensor | None
    report: LayerReport


def solve_site(
    members: list[LayerPlan],
    weights: list[Tensor],
    choice: Choice,
    stats: SiteStats | None,
    recipe: Recipe,
) -> list[Solved]:
    """Solve the linears of a site under the chosen transform, and under its close rivals.

    The search judges with plain rounding; what counts is the error after the solver.
    """
    tries = [
        [solve(layer, w, each, stats, recipe) for layer, w in zip(members, weights, strict=True)]
        for each in (choice, *choice.rivals)
    ]
    return min(tries, key=lambda results: sum(r.report.error or 0.0 for r in results))


def solve(
    layer: LayerPlan, weight: Tensor, choice: Choice, stats: SiteStats | None, recipe: Recipe
) -> Solved:
    """One linear: change its weight, round it, measure, correct its mean."""
    transform, fmt = choice.transform, FORMATS[layer.weights]
    changed = transform.w(weight)
    gram = None
    if stats is not None and stats.gram is not None:
        gram = transform.gram(stats.gram.second_moment().to(changed))
    snapped, params = SOLVERS[layer.solver.name].call(
        changed, fmt, gram, **dict(layer.solver.knobs)
    )
    shift = None
    if recipe.correct_bias and stats is not None:
        mean = transform.x(stats.channels.mean().to(changed))
        shift = (changed - snapped) @ mean
    parts = fmt.pack(snapped, params)
    if layer.pre_quant:
        # a copy: linears that share a transform must not share memory, safetensors refuses that
        parts["pre_quant_scale"] = transform.scale.reshape(1, -1).clone()
    if ACTS[layer.acts].static:
        parts["input_scale"] = _static_scale(transform, stats)
    error = _output_error(layer, weight, snapped, transform, shift, stats)
    final = replace(layer, block=transform.block)
    report = LayerReport(layer.name, layer.role, layer.weights, layer.bits(), choice.label, error)
    return Solved(final, parts, transform, shift, report)


def choose(members: list[LayerPlan], weights: list[Tensor], stats: SiteStats | None) -> Choice:
    layer = members[0]
    method = TRANSFORMS[layer.transform.name]
    if method.needs and stats is None:
        raise InputError(f"{layer.name}: transform {layer.transform.name} needs calibration data")
    return method.call(
        weights,
        stats,
        fmt=FORMATS[layer.weights],
        acts=ACTS[layer.acts],
        **dict(layer.transform.knobs),
    )


def _output_error(
    layer: LayerPlan,
    weight: Tensor,
    snapped: Tensor,
    transform: Online,
    shift: Tensor | None,
    stats: SiteStats | None,
) -> float | None:
    """Relative squared error of the layer's output on sampled rows."""
    if stats is None or stats.reservoir is None:
        return None
    x = stats.reservoir.rows.to(weight)
    want = x @ weight.T
    got = fake_quantize(transform.x(x), ACTS[layer.acts]) @ snapped.T
    if shift is not None:
        got = got + shift
    return float((got - want).square().sum() / want.square().sum().clamp(min=1e-30))


def _static_scale(transform: Online, stats: SiteStats | None) -> Tensor:
    """One activation scale per timestep bin (1, bins), from sampled rows."""
    if stats is None or stats.reservoir is None:
        raise InputError("static activation scales need calibration data")
    rows = transform.x(stats.reservoir.rows.to(transform.scale.device))
    bins = (stats.reservoir.stratum // 2).to(rows.device)
    everything = row_scale(rows.reshape(1, -1)).reshape(())
    scales = [
        row_scale(rows[bins == b].reshape(1, -1)).reshape(()) if (bins == b).any() else everything
        for b in range(stats.bins)
    ]
    return torch.stack(scales).reshape(1, -1)


def describe(site: Site, stats: SiteStats | None, choice: Choice, transform: Online) -> SiteReport:
    report = SiteReport(site.name, candidates=choice.errors)
    if stats is None or stats.reservoir is None or not len(stats.reservoir.rows):
        return report
    rows, bins = stats.reservoir.rows, stats.reservoir.stratum // 2
    after = transform.x(rows.to(transform.scale.device)).cpu()
    for b in range(stats.bins):
        if (bins == b).any():
            report.peaks.append(_imbalance(rows[bins == b]))
            report.peaks_after.append(_imbalance(after[bins == b]))
    return report


def _imbalance(rows: Tensor) -> float:
    """Largest channel peak over the mean channel peak (ViDiT-Q's measure of imbalance)."""
    peaks = rows.abs().amax(0)
    return float(peaks.max() / peaks.mean().clamp(min=1e-30))


def alike(site: Site, plan: Plan) -> list[list[LayerPlan]]:
    """The quantized linears of a site, those together that can share one transform."""
    groups: dict[tuple[Call, str, int], list[LayerPlan]] = {}
    for linear in site.linears:
        layer = plan[linear.name]
        if not layer.kept:
            groups.setdefault((layer.transform, layer.acts, layer.block), []).append(layer)
    return list(groups.values())


def float_weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()
