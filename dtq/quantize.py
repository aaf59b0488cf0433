# SPDX-License-Identifier: Apache-2.0
"""The story: plan, calibrate, transform, solve, guard or allocate, swap, refine, step policy."""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from dtq import sentinel, steps
from dtq.budget import RECORDED, check_budget, compare, guard, mixed
from dtq.calibrate import engine, sets, store
from dtq.calibrate.calls import Recorded, spread
from dtq.calibrate.engine import Statistics
from dtq.calibrate.gather import gather
from dtq.calibrate.record import sample_calls
from dtq.config import DTQConfig
from dtq.diffusers import mark
from dtq.errors import InputError
from dtq.families import Scan
from dtq.nn.swap import finish
from dtq.paging import paged
from dtq.plan import Plan
from dtq.recipe import Calibration, Recipe
from dtq.refine import REFINE
from dtq.solve import built, solve_all
from dtq.solved import LayerReport, SiteReport
from dtq.source import Components, Source, open_sources, scan_model
from dtq.transforms import TRANSFORMS
from dtq.work import Work

log = logging.getLogger("dtq")

_TEACHER_CALLS = 40  # of the float model, that fine-tuning learns from


@dataclass
class Report:
    """Everything that was decided and measured while quantizing."""

    plan: Plan
    edges: tuple[float, ...]
    layers: list[LayerReport] = field(default_factory=list)
    sites: list[SiteReport] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    compared: dict[str, float] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    refine: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    sentinel: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``dtq_report.json``."""
        return {
            "recipe": self.plan.recipe,
            "bits_gemm": self.plan.bits(self.plan.gemm()),
            "bits_all": self.plan.bits(self.plan.quantized()),
            "edges": list(self.edges),
            "calibration": self.about,
            "compared": self.compared,
            "allocation": self.allocation,
            "refine": self.refine,
            "steps": self.steps,
            "sentinel": self.sentinel,
            "layers": [asdict(layer) for layer in self.layers],
            "sites": [asdict(site) for site in self.sites],
        }


def quantize(
    model: Any,
    recipe: str | Recipe = "w4a8",
    *,
    statistics: Statistics | None = None,
    inputs: Iterable[dict[str, Any]] | None = None,
    component: Components = "auto",
    dtype: str | torch.dtype = "auto",
    modules_to_not_convert: Sequence[str] = (),
    progress: bool = True,
    memory: int | None = None,
    last_look: bool = True,
    **overrides: Any,
) -> Any:
    """Quantize a diffusion transformer after training.

    Args:
        model: a diffusers pipeline, a transformer, a folder, a hub id, or ``demo``. Objects are
            changed in place.
        recipe: name, YAML path or :class:`Recipe`.
        statistics: from an earlier calibration of the same model; otherwise it is run now.
        inputs: keyword arguments of the transformer's forward to calibrate a bare one on.
        component: which parts of a pipeline to quantize; ``auto`` is every diffusion transformer.
        dtype: of everything that is not quantized, when opening a folder; see ``open_source``.
        modules_to_not_convert: layers to keep: names, prefixes, path components, ``re:...``.
        progress: show progress bars.
        memory: bytes that the statistics may take; default: half of what is free.
        last_look: at the end, run the model beside the float one for a few steps and promote
            layers that fail (``dtq.sentinel``).
        **overrides: top-level recipe keys, such as ``modulation="w4a16"``.

    Returns:
        The pipeline if there is one, else the transformer; ``model.hf_quantizer.report`` on the
        transformer tells what was decided and measured.

    Raises:
        InputError, RecipeError: what was given cannot be used; nothing was changed.
    """
    chosen = Recipe.load(recipe, **overrides)
    sources = open_sources(model, dtype=dtype, component=component)
    quantize_sources(
        sources,
        chosen,
        statistics=statistics,
        inputs=inputs,
        skip=modules_to_not_convert,
        progress=progress,
        memory=memory,
        last_look=last_look,
    )
    first = sources[0]
    return first.pipeline if first.pipeline is not None else first.model


def quantize_sources(
    sources: Sequence[Source],
    recipe: Recipe,
    *,
    statistics: Statistics | None = None,
    inputs: Iterable[dict[str, Any]] | None = None,
    skip: Sequence[str] = (),
    progress: bool = True,
    work: Work | None = None,
    memory: int | None = None,
    last_look: bool = False,
) -> dict[str, Report]:
    """Quantize the transformers of one pipeline, or a bare one; see :func:`quantize`.

    All of them are calibrated, and the calls that alternatives are compared on are recorded, before
    the first is changed: each sees the float pipeline, in every process.

    Args:
        sources: the opened transformers.
        recipe, statistics, inputs, skip, progress, memory: as for :func:`quantize`.
        work: where units of work are kept and shared by processes; default: in memory.

    Returns:
        A report per component.

    Raises:
        InputError: statistics or inputs are given, which are those of one transformer, but there
            are several.
    """
    if len(sources) == 1:
        (one,) = sources
        how: dict[str, Any] = {"skip": skip, "progress": progress, "work": work, "memory": memory}
        how["last_look"] = last_look
        report = quantize_source(one, recipe, statistics=statistics, inputs=inputs, **how)
        return {one.component: report}
    if statistics is not None or inputs is not None:
        names = ", ".join(source.component for source in sources)
        raise InputError(
            f"statistics and inputs are those of one transformer, the pipeline has {names}: "
            f"quantize them one by one with component="
        )
    work = work or Work()
    seen: dict[str, Statistics | None] = {}
    recorded: dict[str, list[Recorded]] = {}
    for source in sources:
        scan, _ = plan_source(source, recipe, skip)
        needs = recipe.needs()
        seen[source.component] = (
            calibrate_source(
                source, scan, recipe, needs, progress=progress, memory=memory,
                work=work.within(source.component),
            )
            if needs
            else None
        )  # fmt: skip
        recorded[source.component] = _record(source, recipe, None)
    return {
        source.component: quantize_source(
            source,
            recipe,
            statistics=seen[source.component],
            recorded=recorded.pop(source.component),
            skip=skip,
            progress=progress,
            work=work.within(source.component),
            memory=memory,
            last_look=last_look,
        )
        for source in sources
    }


def quantize_source(
    source: Source,
    recipe: Recipe,
    *,
    statistics: Statistics | None = None,
    inputs: Iterable[dict[str, Any]] | None = None,
    recorded: list[Recorded] | None = None,
    skip: Sequence[str] = (),
    progress: bool = True,
    config: DTQConfig | None = None,
    work: Work | None = None,
    memory: int | None = None,
    last_look: bool = False,
) -> Report:
    """Quantize the model of an opened source in place; see :func:`quantize_sources`.

    ``recorded`` are calls of the float model, made now if they are not given. ``config`` is the one
    that diffusers already holds, when it does; it is completed. Of several processes all but the
    first leave when formats are decided; their model stays float.
    """
    work = work or Work()
    calls = None if inputs is None else list(inputs)
    source.model.eval()  # as from_pretrained leaves it; DiT's label embedder drops labels otherwise
    scan, plan = plan_source(source, recipe, skip, calls)
    if recipe.allocate.budget:
        check_budget(plan, recipe)
    needs = recipe.needs()
    driven = source.pipeline is not None or calls is not None
    if statistics is None and needs_of(recipe, driven):
        statistics = calibrate_source(
            source, scan, recipe, needs, inputs=calls, progress=progress, memory=memory, work=work
        )
    elif statistics is not None:
        _check_statistics(statistics, scan, needs)
    elif needs:
        log.warning("no calibration data: solver %s falls back to clip search", recipe.solver.name)
    report = Report(plan, statistics.edges if statistics and plan.bins > 1 else ())
    report.about = dict(statistics.about) if statistics else {"origin": "none"}
    if recorded is None:
        recorded = _record(source, recipe, calls)
    solved, report.sites = solve_all(
        source.model, scan, plan, recipe, statistics, progress=progress, work=work
    )
    if recipe.compare and recorded:
        report.compared = compare(
            source.model, scan, plan, recipe, statistics, recorded, solved, progress=progress,
            work=work,
        )  # fmt: skip
    elif recipe.compare:
        log.warning(
            "no pipeline and no inputs to compare transforms on: %s stays, without trying %s",
            recipe.transform.name, ", ".join(recipe.compare),
        )  # fmt: skip
    if recipe.allocate.budget:
        plan, chosen = mixed(
            source.model, scan, plan, recipe, statistics, recorded, solved, progress=progress,
            work=work,
        )  # fmt: skip
        report.allocation = chosen.to_json()
    work.meet()
    if not work.team.leads:
        return report
    if not recipe.allocate.budget:
        plan = guard(source.model, scan, plan, recipe, statistics, solved, work)
    report.plan = plan
    dtype = source.dtype  # before the first swap
    floats: dict[str, nn.Module] = {}
    for layer in plan.quantized():
        result = solved.pop(layer.name)
        report.layers.append(result.report)
        old = source.model.get_submodule(layer.name)
        source.model.set_submodule(layer.name, built(result, old, plan.bins, dtype))
        if recipe.refine.name != "none" or last_look:
            floats[layer.name] = old  # the teacher, and what the last look compares with
    # of the command the model is only written; if it runs, it runs as it will when loaded
    runs = work.folder is None or recipe.refine.name != "none" or bool(recipe.steps.modes)
    runs = runs or last_look
    finish(source.model, report.edges, align=runs)
    config = config or DTQConfig(modules_to_not_convert=list(skip) or None)
    if recipe.refine.name != "none":
        report.refine = (
            REFINE[recipe.refine.name](
                source.model,
                floats,
                spread(recorded, _TEACHER_CALLS),
                progress=progress,
                save=work.folder / "refine" if work.folder is not None else None,
                **dict(recipe.refine.knobs),
            )
        ).to_json()
    if recipe.steps.modes:
        top = source.family.largest_timestep if source.family else 0.0
        policy = steps.search(
            source.model, recorded, recipe, static_edges=report.edges, top=top, progress=progress
        )
        config.extra["runtime"] = {"diffusion_step_policy": policy.to_json()}
        report.steps = policy.to_json()
    if last_look and (driven or statistics is not None):
        plan, report.sentinel = sentinel.watch(
            source, floats, scan, plan, recipe, statistics, report.layers,
            inputs=calls, progress=progress,
        )  # fmt: skip
        report.plan = plan
    del floats
    mark(source.model, plan, report.edges, dtype, config)
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
    if source.scan is None:
        with paged(*_modules(source)):
            source.scan = scan_model(source.model, _first_call(source, recipe.calibration, calls))
    scan = source.scan
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
    memory: int | None = None,
    work: Work | None = None,
) -> Statistics:
    """Run the float model over the recipe's calibration set.

    Once, if the statistics fit in ``memory`` bytes (default: half of what is free); else as often
    as it takes, each time for as many inputs as fit, and they wait on disk. Each part of the set
    that is seen is kept in ``work``.
    """
    work = work or Work()
    plan = recipe.plan(scan)
    sites = [s for s in scan.sites if any(not plan[x.name].kept for x in s.linears)]
    how = recipe.calibration
    memory = memory or psutil.virtual_memory().available // 2
    portions = engine.portions(sites, how.bins, needs, memory)
    calls = None if inputs is None else list(inputs)
    with paged(*_modules(source)):
        if len(portions) == 1 and work.folder is None:
            return engine.calibrate(source, sites, how, needs, inputs=calls, progress=progress)
        if len(portions) > 1:
            log.warning(
                "the statistics of %d inputs do not fit in %.1f GB: the float model runs %d times",
                len(sites), memory / 1e9, len(portions),
            )  # fmt: skip
        folder = None
        if work.folder is None:
            folder = tempfile.TemporaryDirectory(prefix="dtq-statistics-")
            work = Work(Path(folder.name))
        runs = engine.drive(source, how, calls)
        files = [
            gather(source, portion, how, needs, runs, work, progress=progress)
            for portion in portions
        ]
    statistics = engine.lent(store.load(*files))  # a sibling may be in another portion
    if folder is not None:
        weakref.finalize(statistics, folder.cleanup)
    return statistics


def _modules(source: Source) -> list[nn.Module]:
    """The model, and the others of its pipeline."""
    parts = source.pipeline.components.values() if source.pipeline is not None else [source.model]
    return [part for part in parts if isinstance(part, nn.Module)]


def on_the_fly(model: nn.Module, config: DTQConfig, keep: list[str]) -> Report:
    """What ``from_pretrained(..., quantization_config=DTQConfig(...))`` does to a float model."""
    recipe = Recipe.load(config.recipe, **config.extra)
    source = Source(type(model).__name__, None, "transformer", model)
    model.is_quantized = False  # type: ignore[assignment]  # diffusers says so before it is done
    skip = [*(config.modules_to_not_convert or ()), *keep]
    return quantize_source(source, recipe, skip=skip, progress=False, config=config)


def _first_call(source: Source, how: Calibration, calls: Sequence[dict[str, Any]] | None) -> Any:
    """How to trace one forward: a given call, made-up inputs, or a step of the pipeline."""
    if calls:
        return lambda model: model(**calls[0])
    if source.family is not None or source.pipeline is None:
        return None
    pipeline, once = source.pipeline, replace(how, samples=1, steps=1, batch=1)

    def run(model: nn.Module) -> None:
        for _ in engine.run_pipeline(pipeline, sets.load(once.set, pipeline, 1), once):
            pass

    return run


def needs_of(recipe: Recipe, driven: bool) -> frozenset[str]:
    """The statistics that are collected for a recipe.

    Weight-only recipes whose transform needs none lose little without data: where no pipeline and
    no inputs drive the model they do without.
    """
    without = not TRANSFORMS[recipe.transform.name].needs
    data_free = recipe.acts == "none" and without and not recipe.rules
    return recipe.needs() if driven or not data_free else frozenset()


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


def _record(
    source: Source, recipe: Recipe, calls: Sequence[dict[str, Any]] | None
) -> list[Recorded]:
    """One sampling run of the float model, for the stages that compare with it."""
    needed = recipe.allocate.budget or recipe.steps.modes or recipe.refine.name != "none"
    # made-up inputs would say little about which transform is better
    wanted = recipe.compare and (source.pipeline is not None or calls is not None)
    if not needed and not wanted:
        return []
    with paged(*_modules(source)):
        return sample_calls(source, recipe.calibration, RECORDED, inputs=calls)
