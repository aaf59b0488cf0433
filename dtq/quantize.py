# SPDX-License-Identifier: Apache-2.0
"""The story: plan, calibrate, transform, solve, guard, swap."""

from __future__ import annotations

import logging
import statistics as numbers
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from dtq.calibrate import engine, sets
from dtq.calibrate.engine import Statistics
from dtq.config import DTQConfig
from dtq.diffusers import mark
from dtq.errors import InputError
from dtq.families import Scan
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import finish
from dtq.plan import Plan
from dtq.recipe import Recipe
from dtq.solve import (
    LayerReport,
    SiteReport,
    Solved,
    alike,
    choose,
    describe,
    float_weight,
    solve,
    solve_site,
)
from dtq.source import Source, open_source, scan_model
from dtq.transforms import Choice

log = logging.getLogger("dtq")


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
) -> dict[str, Solved]:
    solved: dict[str, Solved] = {}
    work = [s for s in scan.sites if any(not plan[x.name].kept for x in s.linears)]
    total = sum(len(s.linears) for s in work)
    with tqdm(
        total=total, desc="quantize", unit="layer", disable=not progress, dynamic_ncols=True
    ) as bar:
        for site in work:
            stats = statistics.sites.get(site.name) if statistics else None
            for members in alike(site, plan):
                weights = [float_weight(model, layer.name) for layer in members]
                choice = choose(members, weights, stats)
                best = solve_site(members, weights, choice, stats, recipe)
                solved |= {result.plan.name: result for result in best}
                report.sites.append(describe(site, stats, choice, best[0].transform))
                bar.update(len(members))
            bar.update(sum(plan[x.name].kept for x in site.linears))
    return solved


def _guard(
    model: nn.Module,
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    solved: dict[str, Solved],
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
        again = solve(
            raised,
            float_weight(model, layer.name),
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


def _final(plan: Plan, solved: dict[str, Solved]) -> Plan:
    """The plan with the Hadamard blocks that were chosen."""
    return plan.with_layers(
        {x.name: replace(x, block=solved[x.name].plan.block) for x in plan.quantized()}
    )


def _swap(model: nn.Module, result: Solved, bins: int, compute_dtype: torch.dtype) -> None:
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
