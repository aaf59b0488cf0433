# SPDX-License-Identifier: Apache-2.0
"""Which models of a pipeline are quantized, with which recipe: one :class:`Run` for each.

``dtq quantize`` opens runs of loaded models, ``dtq plan`` makes them of models without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtq.checkpoint.config import DTQConfig
from dtq.errors import InputError
from dtq.models import is_text_encoder
from dtq.pipelines.loading import LoadedModel
from dtq.recipe import Recipe
from dtq.recipe.resolve import BNB_NF4, KEEP, TEXT_RECIPE, for_text_encoder
from dtq.recipe.selectors import check_patterns, pattern_list
from dtq.runs.tasks import TaskStore
from dtq.stages.pipeline_sizes import PipelineBudget
from dtq.stages.run import Run


@dataclass(frozen=True)
class Wanted:
    """What is asked for of a pipeline.

    Attributes:
        recipe: of the transformers.
        text_encoder: what to do with the text encoders: ``keep``, ``bnb-nf4`` (they are converted
            after the run), or a recipe. None: the budget decides, and without one they are kept.
        budget: for all weight files of the pipeline.
        embeddings: a key of ``EMBEDDINGS``, for the text encoders that are quantized; None: that of
            their recipe.
    """

    recipe: Recipe
    text_encoder: str | Path | Recipe | None = None
    budget: PipelineBudget | None = None
    embeddings: str | None = None

    @property
    def text_runs(self) -> bool:
        """Whether text encoders have runs: one choice is a recipe, or a budget decides."""
        if self.text_encoder is None:
            return self.budget is not None
        return self.text_encoder not in (KEEP, BNB_NF4)


def make_runs(
    models: Sequence[LoadedModel], texts: Sequence[LoadedModel], wanted: Wanted, **options: Any
) -> list[Run]:
    """One :class:`Run` for each transformer, then one for each text encoder.

    Args:
        models: the transformers; models on the meta device will do for a plan.
        texts: the text encoders that are quantized.
        wanted: what to do.
        **options: fields of :class:`Run`: ``inputs``, ``tasks``, ``exclude``, ``statistics``, ...

    Raises:
        InputError: an entry of ``exclude`` matches nothing; ``embeddings`` is given, and no text
            encoder is quantized.
    """
    recipe, budget = wanted.recipe, wanted.budget
    tasks = options.pop("tasks", None) or TaskStore()
    if budget is not None:
        recipe, options = _within_budget(models[0], recipe, options)
    every = [*models, *texts]
    excluded = pattern_list(options.get("exclude"), "modules_to_not_convert")
    check_patterns(excluded, [each.model for each in every], "modules_to_not_convert (--exclude)")
    options["exclude"] = excluded

    def make(model: LoadedModel, recipe: Recipe, options: dict[str, Any]) -> Run:
        own = tasks.namespace(model.component) if len(every) > 1 else tasks
        config = DTQConfig(modules_to_not_convert=[*excluded] or None)
        return Run(model, recipe, own, **{"config": config, **options})

    own_tables = {} if wanted.embeddings is None else {"embeddings": wanted.embeddings}
    _check_embeddings(wanted, every)
    runs = []
    for model in models:  # a bare text encoder is one of them
        changed = own_tables if is_text_encoder(model.model) else {}
        runs.append(make(model, Recipe.load(recipe, **changed) if changed else recipe, options))
    if texts:
        shares = wanted.text_encoder is None
        what = TEXT_RECIPE if wanted.text_encoder is None else wanted.text_encoder
        own = Recipe.load(what, **own_tables)
        chosen = for_text_encoder(own, recipe.calibration, shares_budget=shares)
        # inputs, statistics and targets are those of a transformer
        options = options | {"inputs": None, "statistics": None, "target": ""}
        options |= {"shares_budget": shares, "may_stay_float": shares}
        runs += [make(model, chosen, options) for model in texts]
    return runs


def _check_embeddings(wanted: Wanted, models: Sequence[LoadedModel]) -> None:
    """Refuse a format of the tables of text encoders where none is quantized.

    Raises:
        InputError: there is no run of a text encoder.
    """
    if wanted.embeddings in (None, KEEP) or any(is_text_encoder(m.model) for m in models):
        return
    given = f"embeddings={wanted.embeddings}"
    kept = "none is quantized"
    if wanted.text_encoder == BNB_NF4:
        kept = "bitsandbytes keeps them"
    raise InputError(
        f"{given} is the format of tables of text encoders, and {kept}: give a recipe for the text "
        f"encoders too, such as --text-encoder w4a16 (text_encoder=). Tables of a denoiser are a "
        f"key of its own recipe: --set {given}"
    )


def _within_budget(
    loaded: LoadedModel, recipe: Recipe, options: dict[str, Any]
) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and options of a denoiser whose formats the budget of the pipeline chooses.

    Raises:
        InputError: the pipeline would not be sampled.
    """
    if options.get("inputs") is not None and loaded.pipeline is not None:
        raise InputError("a budget of a pipeline is distributed by its own samples: omit inputs")
    recipe = replace(recipe, allocate=replace(recipe.allocate, budget=""))
    return recipe, {**options, "shares_budget": True}
