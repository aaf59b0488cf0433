# SPDX-License-Identifier: Apache-2.0
"""The stages of quantization, in order, and the functions that run them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtq.calibrate.collection import Statistics
from dtq.checkpoint.config import DTQConfig
from dtq.errors import InputError
from dtq.io.default_dtype import default_dtype
from dtq.pipelines.contents import Components, text_encoders
from dtq.pipelines.loading import LoadedModel, load_transformers, text_encoders_of
from dtq.recipe import Recipe
from dtq.recipe.resolve import BNB_NF4
from dtq.runs.tasks import TaskStore
from dtq.stages.attach_config import attach_config
from dtq.stages.attention import attention
from dtq.stages.autoencoder import check_vae, quantize_autoencoder
from dtq.stages.budget_rounds import BudgetRounds
from dtq.stages.calibrate import calibrate
from dtq.stages.compare_transforms import compare_transforms
from dtq.stages.finetune import finetune
from dtq.stages.make_runs import Wanted, make_runs
from dtq.stages.mixed_precision import mixed_precision
from dtq.stages.pipeline_budget import SharedBudget, record_sampling
from dtq.stages.pipeline_sizes import PipelineBudget, check_budget
from dtq.stages.plan import plan
from dtq.stages.promote import promote
from dtq.stages.record_calls import record_calls
from dtq.stages.replace_layers import replace_layers
from dtq.stages.report import Report
from dtq.stages.run import Run
from dtq.stages.sanity_check import sanity_check
from dtq.stages.solve import solve
from dtq.stages.step_policy import step_policy
from dtq.stages.text_nf4 import check_nf4, quantize_text_encoders_nf4

FLOAT_STAGES = (plan, calibrate, record_calls)
"""Run for every transformer of the pipeline before the first of them is changed."""

SHARED_STAGES = (solve, compare_transforms, mixed_precision)
"""Run in every process; the processes share the tasks and then meet at a barrier."""

MAIN_STAGES = (
    promote, replace_layers, finetune, step_policy, attention, sanity_check, attach_config
)  # fmt: skip
"""Run in the main process alone; in the others the model stays float."""


def run_stages(runs: Sequence[Run], budget: PipelineBudget | None = None) -> dict[str, Report]:
    """Quantize the models of one pipeline in place; a report for each by component name.

    A stage returns at once where the recipe does not ask for it. What is computed does not depend
    on the default dtype of torch.

    Args:
        runs: from :func:`open_runs` with the same budget.
        budget: for all weight files of the pipeline; its ``outcome`` is filled in.
    """
    with default_dtype(torch.float32):
        for stage in FLOAT_STAGES:  # a model that is refused is refused before any is calibrated
            for run in runs:
                stage(run)
        if budget is not None:
            _run_within(runs, budget)
        else:
            for run in runs:
                for stage in SHARED_STAGES:
                    stage(run)
                run.tasks.barrier()
                if run.tasks.workers.is_main:
                    for stage in MAIN_STAGES:
                        stage(run)
    return {run.loaded.component: run.report for run in runs}


def _run_within(runs: Sequence[Run], budget: PipelineBudget) -> None:
    """Choose the formats of all models together, before the first of them is changed."""
    check_budget(runs, budget)
    sampling = record_sampling(runs)
    for run in runs:
        for stage in SHARED_STAGES:
            stage(run)
    shared = SharedBudget(runs, budget, sampling)
    shared.measure()
    runs[0].tasks.barrier()
    if runs[0].tasks.workers.is_main:
        for run in runs:
            promote(run)  # of a recipe that the user chose: its bytes count as they are then
        for changed in BudgetRounds(shared):
            for run in changed:
                for stage in MAIN_STAGES[1:-1]:
                    stage(run)
        for run in runs:
            if run.plan.quantized():
                attach_config(run)


def open_runs(
    models: Sequence[LoadedModel],
    recipe: Recipe,
    *,
    inputs: Iterable[dict[str, Any]] | None = None,
    tasks: TaskStore | None = None,
    text_encoder: str | Path | Recipe | None = None,
    budget: PipelineBudget | None = None,
    embeddings: str | None = None,
    **options: Any,
) -> list[Run]:
    """One :class:`Run` for each transformer, then one for each text encoder that is quantized.

    Args:
        models: the transformers of one pipeline, or a bare one.
        recipe: what to do.
        text_encoder: see :class:`~dtq.stages.make_runs.Wanted`.
        budget: for all weight files of the pipeline.
        embeddings: see :class:`~dtq.stages.make_runs.Wanted`.
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
    wanted = Wanted(recipe, text_encoder, budget, embeddings)
    pipeline, texts = models[0].pipeline, []
    if text_encoder == BNB_NF4:  # refused now, converted at the end
        check_nf4()
        text_encoders_of(models[0])
    elif wanted.text_runs:
        optional = text_encoder is None  # a budget takes what there is
        if not optional or (pipeline is not None and text_encoders(pipeline)):
            texts = text_encoders_of(models[0])
    return make_runs(models, texts, wanted, inputs=inputs, tasks=tasks, **options)


def quantize(
    model: Any,
    recipe: str | Recipe = "w4a8",
    *,
    statistics: Statistics | None = None,
    inputs: Iterable[dict[str, Any]] | None = None,
    component: Components = "auto",
    dtype: str | torch.dtype = "auto",
    variant: str | None = None,
    modules_to_not_convert: str | Sequence[str] | None = (),
    progress: bool = True,
    memory: int | None = None,
    sanity_check: bool = True,
    to: str = "",
    text_encoder: str | Path | Recipe | None = None,
    embeddings: str | None = None,
    vae: str | None = None,
    budget: str | None = None,
    **overrides: Any,
) -> Any:
    """Quantize a diffusion transformer after training, and the text encoders of its pipeline.

    Args:
        model: a diffusers pipeline, a transformer, a text encoder of transformers, a folder, a hub
            id, or ``demo``. Objects are changed in place.
        recipe: name, YAML path or :class:`Recipe`.
        statistics: of an earlier calibration of the same model; default: calibrate now.
        inputs: keyword arguments of the transformer's forward to calibrate a bare one on.
        component: components of the pipeline to quantize; ``auto``: every diffusion transformer.
        dtype: of everything that is not quantized, when a folder is loaded; ``auto``: as stored.
        variant: of the weight files of a folder or hub id, such as ``fp16``; default: files
            without a variant, or the only one that there is.
        modules_to_not_convert: layers that stay unquantized: names, prefixes, path components, as
            they are or as globs; ``re:...``. One that matches nothing is refused.
        progress: whether to show progress bars.
        memory: bytes that the statistics may take; default: half of the free memory.
        sanity_check: whether to compare a short sampling run with the float model at the end, and
            promote the layers that fail (``dtq.stages.sanity_check``).
        to: name of a target of :func:`dtq.export` that the model must fit: what its engine cannot
            hold is adapted or refused before calibration. Empty: any model.
        text_encoder: ``keep`` leaves the text encoders of a pipeline as they are; a recipe (name,
            path or :class:`Recipe`) quantizes them, calibrated on the same prompts; ``bnb-nf4``
            stores them in NF4 of bitsandbytes, which loads without dtq. Default: the budget
            decides; without one they are kept.
        embeddings: how the tables of token embeddings of the quantized text encoders, or of a bare
            one, are stored: ``w8``, ``w4`` or ``keep``; default: as their recipe says, which keeps
            them.
        vae: ``w8`` also stores the autoencoder with 8-bit weights, ``keep`` leaves it; default as
            above. ``pipeline.vae.hf_quantizer.report`` has the PSNR of its decodes.
        budget: size of all weight files of the pipeline, such as ``12GB``; formats are chosen by
            measured sensitivity. Bits per weight are ``allocate={"budget": 4.8}``.
        **overrides: top-level recipe keys, such as ``modulation="w4a16"``.

    Returns:
        The pipeline if there is one, else the transformer. ``model.hf_quantizer.report`` on the
        transformer holds what was decided and measured.

    Raises:
        InputError: an argument cannot be used; the model is not changed.
        RecipeError: the recipe has mistakes; all of them are in the message.
    """
    chosen, limit = Recipe.load(recipe, **overrides), PipelineBudget.of(budget, vae, text_encoder)
    models = load_transformers(model, dtype=dtype, component=component, variant=variant)
    runs = open_runs(
        models, chosen, inputs=inputs, statistics=statistics, exclude=modules_to_not_convert,
        progress=progress, memory=memory, check=sanity_check, target=to,
        text_encoder=text_encoder, embeddings=embeddings, budget=limit,
    )  # fmt: skip
    first = runs[0].loaded
    check_vae(first.pipeline, vae or "keep")
    run_stages(runs, limit)
    if text_encoder == BNB_NF4:
        quantize_text_encoders_nf4(first)
    vae = vae or "keep" if limit is None else limit.outcome["vae"]
    quantize_autoencoder(first.pipeline, vae, chosen.calibration)
    return first.pipeline if first.pipeline is not None else first.model


def quantize_while_loading(model: nn.Module, config: DTQConfig) -> Report:
    """Quantize for ``from_pretrained(..., quantization_config=DTQConfig(...))``, without data.

    Args:
        model: the float model that diffusers has loaded; changed in place.
        config: completed by the stages.
    """
    recipe = Recipe.load(config.recipe, **config.extra)
    model.is_quantized = False  # type: ignore[assignment]  # diffusers sets it before it is true
    loaded = LoadedModel(type(model).__name__, None, "transformer", model)
    exclude = config.modules_to_not_convert
    runs = open_runs([loaded], recipe, exclude=exclude, progress=False, config=config)
    return run_stages(runs)["transformer"]
