# SPDX-License-Identifier: Apache-2.0
"""The story: plan, calibrate, transform, solve, guard, swap."""

from __future__ import annotations

import logging
import statistics as numbers
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dtq.calibrate import engine, sets
from dtq.calibrate.engine import Statistics
from dtq.calibrate.stats import SiteStats
from dtq.config import DTQConfig
from dtq.diffusers import mark
from dtq.errors import InputError
from dtq.families import Scan, Site
from dtq.formats import FORMATS, Parts
from dtq.formats.acts import ACTS, fake_quantize, row_scale
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import finish
from dtq.plan import Call, LayerPlan, Plan
from dtq.recipe import Recipe
from dtq.solvers import SOLVERS
from dtq.source import Source, open_source, scan_model
from dtq.transforms import TRANSFORMS, Choice, Online

log = logging.getLogger("dtq")


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
class Report:
    """Everything that was decided and measured while quantizing."""

    plan: Plan
    edges: tuple[float, ...]
    layers: list[LayerReport] = field(default_factory=list)
    sites: list[SiteReport] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``dtq_report.json``."""
        return {
            "recipe": self.plan.recipe,
            "bits_gemm": self.plan.bits(self.plan.gemm()),
            "bits_all": self.plan.bits(self.plan.quantized()),
            "edges": list(self.edges),
            "calibration": self.about,
            "layers": [asdict(layer) for layer in self.layers],
            "sites": [asdict(site) for site in self.sites],
        }


@dataclass
class _Solved:
    """One layer's result, packed: the float weight stays in the model until the swap."""

    plan: LayerPlan
    parts: Parts
    transform: Online
    bias_shift: Tensor | None
    report: LayerReport


def quantize(
    model: Any,
    recipe: str | Recipe = "w4a8",
    *,
    statistics: Statistics | None = None,
    inputs: Iterable[dict[str, Any]] | None = None,
    component: str = "transformer",
    dtype: str | torch.dtype = "auto",
    modules_to_not_convert: Sequence[str] = (),
    progress: bool = True,
    **overrides: Any,
) -> Any:
    """Quantize a diffusion transformer after training.

    Args:
        model: a diffusers pipeline, a transformer, a folder, a hub id, or ``demo``. Objects are
            changed in place.
        recipe: name, YAML path or :class:`Recipe`.
        statistics: from an earlier calibration of the same model; otherwise it is run now.
        inputs: keyword arguments of the transformer's forward to calibrate a bare one on.
        component: which part of a pipeline to quantize.
        dtype: of everything that is not quantized, when opening a folder; see ``open_source``.
        modules_to_not_convert: layers to keep: names, prefixes, path components, ``re:...``.
        progress: show progress bars.
        **overrides: top-level recipe keys, such as ``modulation="w4a16"``.

    Returns:
        The pipeline if there is one, else the transformer; ``model.hf_quantizer.report`` on the
        transformer tells what was decided and measured.

    Raises:
        InputError, RecipeError: what was given cannot be used; nothing was changed.
    """
    chosen = Recipe.load(recipe, **overrides)
    source = open_source(model, dtype=dtype, component=component)
    quantize_source(
        source,
        chosen,
        statistics=statistics,
        inputs=inputs,
        skip=modules_to_not_convert,
        progress=progress,
    )
    return source.pipeline if source.pipeline is not None else source.model


def quantize_source(
    source: Source,
    recipe: Recipe,
    *,
    statistics: Statistics | None = None,
    inputs: Iterable[dict[str, Any]] | None = None,
    skip: Sequence[str] = (),
    progress: bool = True,
    config: DTQConfig | None = None,
) -> Report:
    """Quantize the model of an opened source in place; see :func:`quantize`.

    ``config`` is the one that diffusers already holds, when it does; it is completed.
    """
    calls = None if inputs is None else list(inputs)
    source.model.eval()  # as from_pretrained leaves it; DiT's label embedder drops labels otherwise
    scan, plan = plan_source(source, recipe, skip, calls)
    needs = recipe.needs()
    driven = source.pipeline is not None or calls is not None
    if statistics is None and needs and (driven or not _data_free(recipe)):
        statistics = calibrate_source(source, scan, recipe, needs, inputs=calls, progress=progress)
    elif statistics is not None:
        _check_statistics(statistics, scan, needs)
    elif needs:
        log.warning("no calibration data: solver %s falls back to clip search", recipe.solver.name)
    report = Report(plan, statistics.edges if statistics and plan.bins > 1 else ())
    report.about = dict(statistics.about) if statistics else {"origin": "none"}
    solved = _solve_all(source.model, scan, plan, recipe, statistics, report, progress)
    plan = _guard(source.model, scan, plan, recipe, statistics, solved)
    report.plan = plan
    dtype = source.dtype  # before the first swap
    for layer in plan.quantized():
        result = solved.pop(layer.name)
        report.layers.append(result.report)
        _swap(source.model, result, plan.bins, dtype)
    finish(source.model, report.edges)
    mark(
        source.model,
        plan,
        report.edges,
        dtype,
        config or DTQConfig(modules_to_not_convert=list(skip) or None),
    )
    source.model.hf_quantizer.report = report  # type: ignore[union-attr, assignment]
    return report


def plan_source(
    source: Source,
    recipe: Recipe,
    skip: Sequence[str] = (),
    calls: Sequence[dict[str, Any]] | None = None,
) -> tuple[Scan, Plan]:
    """Scan the model and resolve the recipe to its layers.

    Args:
        source: the model.
        recipe: what to do.
        skip: layers to keep.
        calls: keyword arguments of forwards; the first is traced, when there are any.

    Raises:
        InputError: it is quantized already, or no layer would be.
    """
    if getattr(source.model, "is_quantized", False):
        raise InputError(f"{source.name} is quantized already; give the float model")
    scan = scan_model(source.model, _first_call(source, calls))
    keep = tuple(getattr(source.model, "_keep_in_fp32_modules", None) or ())
    plan = recipe.plan(scan, (*skip, *keep))
    if not plan.quantized():
        raise InputError(f"recipe {recipe.name} leaves every layer of {source.name} as it is")
    return scan, plan


def calibrate_source(
    source: Source,
    scan: Scan,
    recipe: Recipe,
    needs: frozenset[str],
    *,
    inputs: Iterable[dict[str, Any]] | None = None,
    progress: bool = True,
) -> Statistics:
    """Run the float model once over the recipe's calibration set."""
    plan = recipe.plan(scan)
    sites = [s for s in scan.sites if any(not plan[x.name].kept for x in s.linears)]
    return engine.calibrate(
        source, sites, recipe.calibration, needs, inputs=inputs, progress=progress
    )


def on_the_fly(model: nn.Module, config: DTQConfig, keep: list[str]) -> Report:
    """What ``from_pretrained(..., quantization_config=DTQConfig(...))`` does to a float model."""
    recipe = Recipe.load(config.recipe, **config.extra)
    source = Source(type(model).__name__, None, "transformer", model)
    model.is_quantized = False  # type: ignore[assignment]  # diffusers says so before it is done
    skip = [*(config.modules_to_not_convert or ()), *keep]
    return quantize_source(source, recipe, skip=skip, progress=False, config=config)


def _first_call(source: Source, calls: Sequence[dict[str, Any]] | None) -> Any:
    """How to trace one forward: a given call, made-up inputs, or a step of the pipeline."""
    if calls:
        return lambda model: model(**calls[0])
    if source.family is not None or source.pipeline is None:
        return None
    pipeline, once = source.pipeline, replace(Recipe().calibration, samples=1, steps=1, batch=1)

    def run(model: nn.Module) -> None:
        for _ in engine.run_pipeline(pipeline, sets.load("auto", pipeline, 1), once):
            pass

    return run


def _data_free(recipe: Recipe) -> bool:
    """Weight-only recipes without transforms lose little without data; others need it."""
    return (
        recipe.acts == "none" and recipe.transform.name in ("none", "hadamard") and not recipe.rules
    )


def _check_statistics(statistics: Statistics, scan: Scan, needs: frozenset[str]) -> None:
    for site in scan.sites:
        stats = statistics.sites.get(site.name)
        if stats is None:
            continue
        if stats.columns != site.columns:
            raise InputError(f"the statistics are of another model: {site.name} differs in width")
        missing = [
            n for n in sorted(needs) if n in ("gram", "reservoir") and getattr(stats, n) is None
        ]
        if missing:
            raise InputError(
                f"the statistics lack {', '.join(missing)}; calibrate with this recipe"
            )
    if not any(site.name in statistics.sites for site in scan.sites):
        raise InputError("the statistics are of another model: no layer name matches")


def _solve_all(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    report: Report,
    progress: bool,
) -> dict[str, _Solved]:
    solved: dict[str, _Solved] = {}
    work = [s for s in scan.sites if any(not plan[x.name].kept for x in s.linears)]
    total = sum(len(s.linears) for s in work)
    with tqdm(
        total=total, desc="quantize", unit="layer", disable=not progress, dynamic_ncols=True
    ) as bar:
        for site in work:
            stats = statistics.sites.get(site.name) if statistics else None
            for members in _alike(site, plan):
                weights = [_weight(model, layer.name) for layer in members]
                choice = _choose(members, weights, stats)
                best = _solve_site(members, weights, choice, stats, recipe)
                solved |= {result.plan.name: result for result in best}
                report.sites.append(_describe(site, stats, choice, best[0].transform))
                bar.update(len(members))
            bar.update(sum(plan[x.name].kept for x in site.linears))
    return solved


def _alike(site: Site, plan: Plan) -> list[list[LayerPlan]]:
    """The quantized linears of a site, those together that can share one transform."""
    groups: dict[tuple[Call, str, int], list[LayerPlan]] = {}
    for linear in site.linears:
        layer = plan[linear.name]
        if not layer.kept:
            groups.setdefault((layer.transform, layer.acts, layer.block), []).append(layer)
    return list(groups.values())


def _choose(members: list[LayerPlan], weights: list[Tensor], stats: SiteStats | None) -> Choice:
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


def _solve_site(
    members: list[LayerPlan],
    weights: list[Tensor],
    choice: Choice,
    stats: SiteStats | None,
    recipe: Recipe,
) -> list[_Solved]:
    """Solve the linears of a site under the chosen transform, and under its close rivals.

    The search judges with plain rounding; what counts is the error after the solver.
    """
    tries = [
        [_solve(layer, w, each, stats, recipe) for layer, w in zip(members, weights, strict=True)]
        for each in (choice, *choice.rivals)
    ]
    return min(tries, key=lambda results: sum(r.report.error or 0.0 for r in results))


def _solve(
    layer: LayerPlan, weight: Tensor, choice: Choice, stats: SiteStats | None, recipe: Recipe
) -> _Solved:
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
    return _Solved(final, parts, transform, shift, report)


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


def _guard(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    solved: dict[str, _Solved],
) -> Plan:
    """Promote the layers that came out badly, worst first, while the budget lasts."""
    guard = recipe.guard
    gemm = [x for x in plan.gemm() if solved[x.name].report.error is not None]
    if not guard.to or not gemm or statistics is None:
        return _final(plan, solved)
    errors = {x.name: solved[x.name].report.error or 0.0 for x in gemm}
    limit = min(guard.above, guard.factor * numbers.median(errors.values()))
    site_of = {x.name: site.name for site in scan.sites for x in site.linears}
    for layer in sorted(gemm, key=lambda x: -errors[x.name]):
        if errors[layer.name] <= limit or layer.weights == guard.to:
            continue
        raised = replace(layer, weights=guard.to)
        if (
            plan.with_layers({layer.name: raised}).bits(
                plan.with_layers({layer.name: raised}).gemm()
            )
            > guard.budget
        ):
            continue
        before = solved[layer.name]
        choice = Choice(before.transform, before.report.transform, {})
        again = _solve(
            raised,
            _weight(model, layer.name),
            choice,
            statistics.sites[site_of[layer.name]],
            recipe,
        )
        if (again.report.error or 0.0) >= errors[layer.name]:
            continue
        again.report.promoted, again.report.error_before = True, errors[layer.name]
        solved[layer.name] = again
        plan = plan.with_layers(
            {layer.name: replace(raised, note=f"promoted: error {errors[layer.name]:.1e}")}
        )
        log.info("guard: %s to %s, output error %.1e", layer.name, guard.to, errors[layer.name])
    return _final(plan, solved)


def _final(plan: Plan, solved: dict[str, _Solved]) -> Plan:
    """The plan with the Hadamard blocks that were chosen."""
    return plan.with_layers(
        {x.name: replace(x, block=solved[x.name].plan.block) for x in plan.quantized()}
    )


def _describe(site: Site, stats: SiteStats | None, choice: Choice, transform: Online) -> SiteReport:
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


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def _swap(model: nn.Module, result: _Solved, bins: int, compute_dtype: torch.dtype) -> None:
    """Pack, and put the quantized linear where the float one was."""
    layer = result.plan
    old = model.get_submodule(layer.name)
    assert isinstance(old, nn.Linear)
    new = QuantLinear(
        old.in_features,
        old.out_features,
        old.bias is not None,
        layer.weights,
        layer.acts,
        block=layer.block,
        pre_quant=layer.pre_quant,
        bins=bins,
        compute_dtype=compute_dtype,
        device="meta",
    )
    new.fill({name: part.to(old.weight.device) for name, part in result.parts.items()})
    if old.bias is not None:
        shift = 0.0 if result.bias_shift is None else result.bias_shift
        bias = (old.bias.detach().float() + shift).to(compute_dtype)
        new.bias = nn.Parameter(bias, requires_grad=False)
    new.train(old.training)
    model.set_submodule(layer.name, new)
