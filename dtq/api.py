# SPDX-License-Identifier: Apache-2.0
"""The story: plan, calibrate, transform, solve, guard or allocate, swap, refine, step policy."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from dtq.calibrate.collection import Statistics
from dtq.checkpoint.config import DTQConfig
from dtq.errors import InputError
from dtq.finetune import FINETUNE
from dtq.integrations.diffusers import attach_quantizer
from dtq.nn.swap import finalize
from dtq.pipelines.loading import Components, LoadedModel, load_transformers
from dtq.pipelines.recorded_calls import RecordedCall, subsample
from dtq.recipe.resolve import Recipe
from dtq.runs.tasks import TaskStore
from dtq.stages import sanity_check as sanity
from dtq.stages import step_policy
from dtq.stages.calibrate import _check_statistics, calibrate_source, statistics_needed
from dtq.stages.compare_transforms import compare_transforms
from dtq.stages.mixed_precision import check_budget, mixed_precision
from dtq.stages.plan import plan_source
from dtq.stages.promote import promote
from dtq.stages.record_calls import record_calls
from dtq.stages.report import Report
from dtq.stages.solve import build_quant_linear, solve_all

log = logging.getLogger("dtq")

_TEACHER_CALLS = 40  # of the float model, that fine-tuning learns from


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
    sanity_check: bool = True,
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
        sanity_check: at the end, run the model beside the float one for a few steps and promote
            layers that fail (``dtq.sentinel``).
        **overrides: top-level recipe keys, such as ``modulation="w4a16"``.

    Returns:
        The pipeline if there is one, else the transformer; ``model.hf_quantizer.report`` on the
        transformer tells what was decided and measured.

    Raises:
        InputError, RecipeError: what was given cannot be used; nothing was changed.
    """
    chosen = Recipe.load(recipe, **overrides)
    sources = load_transformers(model, dtype=dtype, component=component)
    quantize_sources(
        sources,
        chosen,
        statistics=statistics,
        inputs=inputs,
        skip=modules_to_not_convert,
        progress=progress,
        memory=memory,
        sanity_check=sanity_check,
    )
    first = sources[0]
    return first.pipeline if first.pipeline is not None else first.model


def quantize_sources(
    sources: Sequence[LoadedModel],
    recipe: Recipe,
    *,
    statistics: Statistics | None = None,
    inputs: Iterable[dict[str, Any]] | None = None,
    skip: Sequence[str] = (),
    progress: bool = True,
    tasks: TaskStore | None = None,
    memory: int | None = None,
    sanity_check: bool = False,
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
        how: dict[str, Any] = {"skip": skip, "progress": progress, "tasks": tasks, "memory": memory}
        how["sanity_check"] = sanity_check
        report = quantize_source(one, recipe, statistics=statistics, inputs=inputs, **how)
        return {one.component: report}
    if statistics is not None or inputs is not None:
        names = ", ".join(source.component for source in sources)
        raise InputError(
            f"statistics and inputs are those of one transformer, the pipeline has {names}: "
            f"quantize them one by one with component="
        )
    tasks = tasks or TaskStore()
    seen: dict[str, Statistics | None] = {}
    recorded: dict[str, list[RecordedCall]] = {}
    for source in sources:
        scan, _ = plan_source(source, recipe, skip)
        needs = recipe.needs()
        seen[source.component] = (
            calibrate_source(
                source, scan, recipe, needs, progress=progress, memory=memory,
                tasks=tasks.namespace(source.component),
            )
            if needs
            else None
        )  # fmt: skip
        recorded[source.component] = record_calls(source, recipe, None)
    return {
        source.component: quantize_source(
            source,
            recipe,
            statistics=seen[source.component],
            recorded=recorded.pop(source.component),
            skip=skip,
            progress=progress,
            tasks=tasks.namespace(source.component),
            memory=memory,
            sanity_check=sanity_check,
        )
        for source in sources
    }


def quantize_source(
    loaded: LoadedModel,
    recipe: Recipe,
    *,
    statistics: Statistics | None = None,
    inputs: Iterable[dict[str, Any]] | None = None,
    recorded: list[RecordedCall] | None = None,
    skip: Sequence[str] = (),
    progress: bool = True,
    config: DTQConfig | None = None,
    tasks: TaskStore | None = None,
    memory: int | None = None,
    sanity_check: bool = False,
) -> Report:
    """Quantize the model of an opened source in place; see :func:`quantize_sources`.

    ``recorded`` are calls of the float model, made now if they are not given. ``config`` is the one
    that diffusers already holds, when it does; it is completed. Of several processes all but the
    first leave when formats are decided; their model stays float.
    """
    tasks = tasks or TaskStore()
    calls = None if inputs is None else list(inputs)
    loaded.model.eval()  # as from_pretrained leaves it; DiT's label embedder drops labels otherwise
    scan, plan = plan_source(loaded, recipe, skip, calls)
    if recipe.allocate.budget:
        check_budget(plan, recipe)
    needs = recipe.needs()
    driven = loaded.pipeline is not None or calls is not None
    if statistics is None and statistics_needed(recipe, driven):
        statistics = calibrate_source(
            loaded, scan, recipe, needs, inputs=calls, progress=progress, memory=memory, tasks=tasks
        )
    elif statistics is not None:
        _check_statistics(statistics, scan, needs)
    elif needs:
        log.warning("no calibration data: solver %s falls back to clip search", recipe.solver.name)
    report = Report(plan, statistics.edges if statistics and plan.bins > 1 else ())
    report.about = dict(statistics.about) if statistics else {"origin": "none"}
    if recorded is None:
        recorded = record_calls(loaded, recipe, calls)
    solved, report.inputs = solve_all(
        loaded.model, scan, plan, recipe, statistics, progress=progress, tasks=tasks
    )
    if recipe.transform_candidates and recorded:
        report.transform_errors = compare_transforms(
            loaded.model, scan, plan, recipe, statistics, recorded, solved, progress=progress,
            tasks=tasks,
        )  # fmt: skip
    elif recipe.transform_candidates:
        log.warning(
            "no pipeline and no inputs to compare transforms on: %s stays, without trying %s",
            recipe.transform.name, ", ".join(recipe.transform_candidates),
        )  # fmt: skip
    if recipe.allocate.budget:
        plan, chosen = mixed_precision(
            loaded.model, scan, plan, recipe, statistics, recorded, solved, progress=progress,
            tasks=tasks,
        )  # fmt: skip
        report.allocation = chosen.to_json()
    tasks.barrier()
    if not tasks.workers.is_main:
        return report
    if not recipe.allocate.budget:
        plan = promote(loaded.model, scan, plan, recipe, statistics, solved, tasks)
    report.plan = plan
    dtype = loaded.dtype  # before the first swap
    floats: dict[str, nn.Module] = {}
    for layer in plan.quantized():
        result = solved.pop(layer.name)
        report.layers.append(result.report)
        old = loaded.model.get_submodule(layer.name)
        loaded.model.set_submodule(layer.name, build_quant_linear(result, old, plan.bins, dtype))
        if recipe.finetune.name != "none" or sanity_check:
            floats[layer.name] = old  # the teacher, and what the last look compares with
    # of the command the model is only written; if it runs, it runs as it will when loaded
    runs = (
        tasks.folder is None
        or recipe.finetune.name != "none"
        or bool(recipe.step_policy.precisions)
    )
    runs = runs or sanity_check
    finalize(loaded.model, report.edges, align=runs)
    config = config or DTQConfig(modules_to_not_convert=list(skip) or None)
    if recipe.finetune.name != "none":
        report.finetune = (
            FINETUNE[recipe.finetune.name](
                loaded.model,
                floats,
                subsample(recorded, _TEACHER_CALLS),
                progress=progress,
                tasks=tasks.namespace("finetune"),
                **dict(recipe.finetune.knobs),
            )
        ).to_json()
    if recipe.step_policy.precisions:
        top = loaded.family.largest_timestep if loaded.family else 0.0
        policy = step_policy.search_step_policy(
            loaded.model, recorded, recipe, static_edges=report.edges, top=top, progress=progress
        )
        config.extra["runtime"] = {"diffusion_step_policy": policy.to_json()}
        report.step_policy = policy.to_json()
    if sanity_check and (driven or statistics is not None):
        plan, report.sanity_check = sanity.sanity_check(
            loaded, floats, scan, plan, recipe, statistics, report.layers,
            inputs=calls, progress=progress,
        )  # fmt: skip
        report.plan = plan
    del floats
    attach_quantizer(loaded.model, plan, report.edges, dtype, config)
    loaded.model.hf_quantizer.report = report  # type: ignore[union-attr, assignment]
    return report


def on_the_fly(model: nn.Module, config: DTQConfig, keep: list[str]) -> Report:
    """What ``from_pretrained(..., quantization_config=DTQConfig(...))`` does to a float model."""
    recipe = Recipe.load(config.recipe, **config.extra)
    source = LoadedModel(type(model).__name__, None, "transformer", model)
    model.is_quantized = False  # type: ignore[assignment]  # diffusers says so before it is done
    skip = [*(config.modules_to_not_convert or ()), *keep]
    return quantize_source(source, recipe, skip=skip, progress=False, config=config)
