# SPDX-License-Identifier: Apache-2.0
"""Which models of a pipeline are quantized, with which recipe: one :class:`Run` for each.

``dtq quantize`` opens runs of loaded models, ``dtq plan`` makes them of models without weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtq.checkpoint.config import DTQConfig
from dtq.errors import InputError
from dtq.pipelines.contents import text_encoders
from dtq.pipelines.loading import LoadedModel, text_encoders_of
from dtq.recipe import Recipe
from dtq.recipe.resolve import BNB_NF4, KEEP, TEXT_RECIPE, for_text_encoder
from dtq.recipe.selectors import check_patterns, pattern_list
from dtq.runs.tasks import TaskStore
from dtq.stages.pipeline_sizes import PipelineBudget
from dtq.stages.run import Run
from dtq.stages.text_nf4 import check_nf4


def open_runs(
    models: Sequence[LoadedModel],
    recipe: Recipe,
    *,
    inputs: Iterable[dict[str, Any]] | None = None,
    tasks: TaskStore | None = None,
    text_encoder: str | Path | Recipe | None = None,
    budget: PipelineBudget | None = None,
    **options: Any,
) -> list[Run]:
    """One :class:`Run` for each transformer, then one for each text encoder that is quantized.

    Args:
        models: the transformers of one pipeline, or a bare one.
        recipe: what to do.
        text_encoder: what to do with the text encoders: ``keep``, ``bnb-nf4`` (they are converted
            after the run), or a recipe. None: the budget decides, and without one they are kept.
        budget: for all weight files of the pipeline.
        inputs: keyword arguments of forwards to calibrate a bare transformer on.
        tasks: where results of tasks are kept and shared by processes; default: in memory.
        **options: fields of :class:`Run`: ``exclude``, ``statistics``, ``memory``, ...

    Raises:
        InputError: statistics or inputs, which belong to one transformer, are given for several; an
            entry of ``exclude`` matches nothing.
    """
    inputs = None if inputs is None else list(inputs)
    if inputs is not None and not all(isinstance(each, Mapping) for each in inputs):
        raise InputError("inputs: expected a list of mappings, keyword arguments of a call each")
    several = len(models) > 1
    if several and (options.get("statistics") is not None or inputs is not None):
        names = ", ".join(model.component for model in models)
        raise InputError(
            f"statistics and inputs are those of one transformer, the pipeline has {names}: "
            f"quantize them one by one with component="
        )
    pipeline, texts = models[0].pipeline, []
    if text_encoder == BNB_NF4:  # refused now, converted at the end
        check_nf4()
        text_encoders_of(models[0])
    elif quantizes_text_encoders(text_encoder, budget):
        optional = text_encoder is None  # a budget takes what there is
        if not optional or (pipeline is not None and text_encoders(pipeline)):
            texts = text_encoders_of(models[0])
    return make_runs(
        models, texts, recipe,
        text_encoder=text_encoder, budget=budget, inputs=inputs, tasks=tasks, **options,
    )  # fmt: skip


def quantizes_text_encoders(
    text_encoder: str | Path | Recipe | None, budget: PipelineBudget | None
) -> bool:
    """Whether text encoders have runs: one choice is a recipe, or a budget decides.

    Args:
        text_encoder: as for :func:`open_runs`.
        budget: as for :func:`open_runs`.
    """
    return text_encoder not in (KEEP, BNB_NF4) and (text_encoder is not None or budget is not None)


def make_runs(
    models: Sequence[LoadedModel],
    texts: Sequence[LoadedModel],
    recipe: Recipe,
    *,
    text_encoder: str | Path | Recipe | None,
    budget: PipelineBudget | None,
    inputs: Any = None,
    tasks: TaskStore | None = None,
    **options: Any,
) -> list[Run]:
    """One :class:`Run` for each transformer, then one for each text encoder.

    Args:
        models: the transformers; models on the meta device will do for a plan.
        texts: the text encoders that are quantized.
        recipe: of the transformers.
        text_encoder: recipe of the text encoders; None: the budget chooses their formats.
        budget: for all weight files of the pipeline.
        inputs: of a bare transformer.
        tasks: as for :func:`open_runs`.
        **options: fields of :class:`Run`.

    Raises:
        InputError: an entry of ``exclude`` matches nothing.
    """
    tasks = tasks or TaskStore()
    if budget is not None:
        recipe, options = _within_budget(models[0], recipe, inputs, options)
    every = [*models, *texts]
    excluded = pattern_list(options.get("exclude"), "modules_to_not_convert")
    check_patterns(excluded, [each.model for each in every], "modules_to_not_convert (--exclude)")
    options["exclude"] = excluded

    def make(model: LoadedModel, recipe: Recipe, inputs: Any, options: dict[str, Any]) -> Run:
        own = tasks.namespace(model.component) if len(every) > 1 else tasks
        config = DTQConfig(modules_to_not_convert=[*excluded] or None)
        return Run(model, recipe, own, inputs, **{"config": config, **options})

    runs = [make(model, recipe, inputs, options) for model in models]
    if texts:
        shares = text_encoder is None
        own = Recipe.load(TEXT_RECIPE if text_encoder is None else text_encoder)
        chosen = for_text_encoder(own, recipe.calibration, shares_budget=shares)
        # statistics and targets are those of a transformer
        options = options | {"statistics": None, "target": ""}
        options |= {"shares_budget": shares, "may_stay_float": shares}
        runs += [make(model, chosen, None, options) for model in texts]
    return runs


def _within_budget(
    loaded: LoadedModel, recipe: Recipe, inputs: Any, options: dict[str, Any]
) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and options of a denoiser whose formats the budget of the pipeline chooses.

    Raises:
        InputError: the pipeline would not be sampled.
    """
    if inputs is not None and loaded.pipeline is not None:
        raise InputError("a budget of a pipeline is distributed by its own samples: omit inputs")
    recipe = replace(recipe, allocate=replace(recipe.allocate, budget=""))
    return recipe, {**options, "shares_budget": True}
