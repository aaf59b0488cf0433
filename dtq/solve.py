# SPDX-License-Identifier: Apache-2.0
"""One input at a time: choose its transform, round the weights that read it, say how that went."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dtq.calibrate.engine import Statistics
from dtq.calibrate.stats import SiteStats
from dtq.errors import InputError
from dtq.families import Scan, Site
from dtq.formats import FORMATS
from dtq.formats.acts import ACTS, fake_quantize, row_scale
from dtq.nn.linear import QuantLinear, matrix_of
from dtq.paging import Mapped, give_freed
from dtq.plan import Call, LayerPlan, Plan
from dtq.recipe import Recipe
from dtq.solved import LayerReport, SiteReport, Solved, from_result, to_result
from dtq.solvers import SOLVERS
from dtq.solvers.check import check
from dtq.solvers.lowrank import LOWRANK, Branch
from dtq.transforms import TRANSFORMS, Choice, Online
from dtq.work import Work

COPIES = 8
"""Float32 matrices of a layer's size that its solver holds."""


class _Input:
    """What calibration keeps of one input, under one transform: worked out once for its readers."""

    def __init__(self, stats: SiteStats | None, choice: Choice, acts: str, like: Tensor) -> None:
        self.stats, self.transform = stats, choice.transform
        self.acts, self.like = ACTS[acts], like
        self.factors: dict[float, Tensor] = {}  # of the gram, see gptq

    @cached_property
    def gram(self) -> Tensor | None:
        """Second moment (K, K) of the changed input, None without calibration."""
        if self.stats is None or self.stats.gram is None:
            return None
        return self.transform.gram(self.stats.gram.second_moment().to(self.like))

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Sampled rows (R, K): as they are, changed, and rounded as the layer multiplies them."""
        if self.stats is None or self.stats.reservoir is None:
            return None
        x = self.stats.reservoir.rows.to(self.like)
        changed = self.transform.x(x)
        return x, changed, fake_quantize(changed, self.acts)


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
    tries = []
    for each in (choice, *choice.rivals):
        seen = _Input(stats, each, members[0].acts, weights[0])
        branches = _branches(members, weights, each, seen)
        jobs = zip(members, weights, branches, strict=True)
        tries.append([solve(layer, w, each, stats, recipe, low, seen) for layer, w, low in jobs])
    return min(tries, key=lambda results: sum(r.report.error or 0.0 for r in results))


def solve(
    layer: LayerPlan,
    weight: Tensor,
    choice: Choice,
    stats: SiteStats | None,
    recipe: Recipe,
    branch: Branch | None = None,
    seen: _Input | None = None,
) -> Solved:
    """One linear: change its weight, split it, round the rest, measure, correct its mean.

    Where the plan gives several formats to choose from, all are solved and the one with the least
    output error (without rows to measure on: weight error) stays.
    """
    seen = seen or _Input(stats, choice, layer.acts, weight)
    names = layer.choose or (layer.weights,)
    tries = [
        _solve_in(replace(layer, weights=n), weight, choice, seen, recipe, branch) for n in names
    ]
    return min(tries, key=lambda r: (r.report.error or 0.0, r.misfit))


def _solve_in(
    layer: LayerPlan,
    weight: Tensor,
    choice: Choice,
    seen: _Input,
    recipe: Recipe,
    branch: Branch | None,
) -> Solved:
    transform, stats, fmt = choice.transform, seen.stats, FORMATS[layer.weights]
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
    given = (seen.gram, seen.factors) if solver.shares else (seen.gram,)
    snapped, params = solver.call(changed, fmt, *given, **dict(layer.solver.knobs))
    shift = None
    if recipe.correct_bias and stats is not None:
        mean = transform.x(stats.channels.mean().to(changed))
        shift = (changed - snapped) @ mean
    parts |= fmt.pack(snapped, params)
    if layer.pre_quant:
        # a copy: linears that share a transform must not share memory, safetensors refuses that
        parts["pre_quant_scale"] = transform.scale.reshape(1, -1).clone()
    if transform.order is not None:
        parts["pre_quant_order"] = transform.order.reshape(1, -1).clone()
    if ACTS[layer.acts].static:
        parts["input_scale"] = _static_scale(transform, stats, ACTS[layer.acts].stepped)
    error = _output_error(weight, snapped, low, shift, seen)
    final = replace(
        layer,
        block=transform.block,
        turns=transform.turns,
        permute=transform.order is not None,
        rank=0 if branch is None else len(branch.down),
    )
    misfit = float((changed - snapped).square().sum())
    report = LayerReport(final.name, final.role, final.weights, final.bits(), choice.label, error)
    return Solved(final, parts, transform, shift, report, misfit)


def _branches(
    members: list[LayerPlan], weights: list[Tensor], choice: Choice, seen: _Input
) -> list[Branch | None]:
    """The low-rank branch of each linear of a site, None where the plan wants none."""
    found: list[Branch | None] = [None] * len(members)
    wanted = [i for i, layer in enumerate(members) if layer.lowrank.name != "none"]
    for key in dict.fromkeys((members[i].lowrank, members[i].weights) for i in wanted):
        same = [i for i in wanted if (members[i].lowrank, members[i].weights) == key]
        changed = [choice.transform.w(weights[i]) for i in same]
        call = key[0]
        made = LOWRANK[call.name].call(changed, FORMATS[key[1]], seen.gram, **dict(call.knobs))
        for i, branch in zip(same, made, strict=True):
            found[i] = branch
    return found


def _moments(stats: SiteStats | None) -> list[Tensor]:
    """Sums over the input that turn NaN or infinite where it was."""
    if stats is None:
        return []
    return [stats.channels.total, *([] if stats.gram is None else [stats.gram.gram])]


def _broken_bins(stats: SiteStats | None) -> str:
    """Where in the trajectory the input was not finite, for messages."""
    good = [] if stats is None else stats.channels.total.isfinite().all(1).tolist()
    bad = [str(b + 1) for b, fine in enumerate(good) if not fine]
    return f": in timestep bins {', '.join(bad)} of {len(good)}" if bad else ""


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
    weight: Tensor, snapped: Tensor, low: Tensor | None, shift: Tensor | None, seen: _Input
) -> float | None:
    """Relative squared error of the layer's output on sampled rows."""
    if seen.rows is None:
        return None
    x, changed, rounded = seen.rows
    want = x @ weight.T
    got = rounded @ snapped.T
    if low is not None:
        got += changed @ low.T
    if shift is not None:
        got += shift
    return float(got.sub_(want).square_().sum() / want.square_().sum().clamp(min=1e-30))


def _static_scale(transform: Online, stats: SiteStats | None, stepped: bool) -> Tensor:
    """One activation scale (1, 1), or one per timestep bin (1, bins), from sampled rows."""
    if stats is None or stats.reservoir is None:
        raise InputError("static activation scales need calibration data")
    rows = transform.x(stats.reservoir.rows.to(transform.scale.device))
    bins = (stats.reservoir.stratum // 2).to(rows.device)
    everything = row_scale(rows.reshape(1, -1)).reshape(())
    if not stepped:
        return everything.reshape(1, 1)
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
    work: Work | None = None,
) -> tuple[dict[str, Solved], list[SiteReport]]:
    """Solve every quantized layer, or those named in ``only``, site by site.

    The linears that share a transform are a unit of ``work``, named after ``what``.
    """
    work = work or Work()
    wanted = {x.name for x in plan.quantized()}
    wanted &= wanted if only is None else set(only)
    jobs: dict[str, tuple[Site, list[LayerPlan]]] = {}
    for site in scan.sites:
        for i, group in enumerate(alike(site, plan)):
            if members := [x for x in group if x.name in wanted]:
                jobs[f"{what}/{site.name}.{i}"] = site, members
    todo = work.todo({unit: _cost(members) for unit, (_, members) in jobs.items()})
    mapped = Mapped()
    with tqdm(
        total=sum(len(jobs[unit][1]) for unit in todo),
        desc=what, unit="layer", disable=not progress, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for unit in todo:
            site, members = jobs[unit]
            stats = statistics.sites.get(site.name) if statistics else None
            weights = [matrix_of(model.get_submodule(layer.name)) for layer in members]
            for layer, w in zip(members, weights, strict=True):
                check(w, *_moments(stats), layer=f"{layer.name}{_broken_bins(stats)}")
            choice = choose(members, weights, stats)
            best = solve_site(members, weights, choice, stats, recipe)
            mapped.release(model.get_submodule(layer.name).weight for layer in members)  # type: ignore[misc]
            work.save(unit, *to_result(best, describe(site, stats, choice, best[0].transform)))
            bar.update(len(members))
            tidy(weights)
    work.meet()
    found = [from_result(*work.load(unit), plan) for unit in jobs]
    solved = {result.plan.name: result for results, _ in found for result in results}
    return solved, [report for _, report in found]


def tidy(weights: list[Tensor]) -> None:
    """Give back memory, but for half of what solving such layers takes: more are to come."""
    give_freed(beyond=COPIES // 2 * 4 * max(w.numel() for w in weights))


def _cost(members: list[LayerPlan]) -> float:
    """In proportion to the time it takes: GPTQ is columns times weights."""
    return sum(math.prod(x.shape) * x.shape[1] for x in members)


def built(result: Solved, old: nn.Module, bins: int, compute_dtype: torch.dtype) -> QuantLinear:
    """The quantized linear that stands in for a float one, or for a 1 x 1 convolution."""
    new = QuantLinear.in_place_of(
        old, result.plan.runtime(), bins=bins, compute_dtype=compute_dtype, device="meta"
    )
    device = next(old.parameters()).device
    new.fill({name: part.to(device) for name, part in result.parts.items()})
    if isinstance(old.bias, Tensor):
        shift = 0.0 if result.bias_shift is None else result.bias_shift
        bias = (old.bias.detach().float() + shift).to(compute_dtype)
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new.train(old.training)
