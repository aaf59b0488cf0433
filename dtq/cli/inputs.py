# SPDX-License-Identifier: Apache-2.0
"""From the values of options to recipes, settings, models and processes.

The commands import this in their functions: their modules must not import torch, or every
``--help`` would.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from diffusers.utils import is_transformers_available
from diffusers.utils import logging as diffusers_logging

from dtq import demo
from dtq.checkpoint import reader
from dtq.errors import InputError
from dtq.io.safe_parse import parse_yaml
from dtq.pipelines import contents, loading
from dtq.pipelines.settings import SamplingSettings
from dtq.pipelines.validation import check_links, model_folders
from dtq.pipelines.weight_files import has_variant
from dtq.recipe import Recipe
from dtq.runs.workers import Workers

_CALIBRATION = ("prompts", "samples", "steps", "guidance", "seed", "images")
"""Keys of ``calibration`` in the recipe that have an option of their own."""

_METHODS = ("transform", "solver", "lowrank", "finetune")
"""Keys of a recipe whose value is a method with knobs."""


def recipe_with(choices: dict[str, Any]) -> Recipe:
    """The recipe with ``--set`` and the shortcuts applied.

    Args:
        choices: values of ``options.recipe``.

    Raises:
        InputError: a ``--set`` has no value, or its key does not exist.
        RecipeError: a value is not one that the recipe takes.
    """
    recipe = Recipe.load(choices["recipe"])
    data = recipe.to_dict()
    data.pop("name")
    chosen = {key: choices[key] for key in _CALIBRATION if choices[key] is not None}
    data["calibration"] |= chosen
    data["calibration"]["pipeline_args"] |= call_arguments(choices["arguments"])
    if choices["budget"] is not None and not size_of_budget(choices):
        data["allocate"] |= {"budget": choices["budget"], "adapt": False}
    for key, text in pairs(choices["settings"], "--set", "KEY=VALUE"):
        setting = f"--set {key}={text}"
        value = parse_yaml(text, setting) if text else ""
        _put(data, key.split("."), value, setting)
        if key in ("allocate.budget", "promote.budget"):  # the user's own is kept, or refused
            data[key.split(".")[0]]["adapt"] = False
    return Recipe.load(recipe, **data)


def size_of_budget(choices: dict[str, Any]) -> str | None:
    """``--budget`` where it is a size, which is for a whole pipeline; bits are for one model."""
    text = choices["budget"]
    return text if text is not None and re.search("[a-zA-Z]", text) else None


def _put(data: dict[str, Any], path: list[str], value: Any, setting: str) -> None:
    if path[0] in _METHODS and len(path) == 3:  # solver.yaqa.parts takes another method, too
        now = data[path[0]]
        if path[1] not in (now if isinstance(now, dict) else [now]):
            data[path[0]] = path[1]
    for step in path[:-1]:
        below: Any = data.get(step)
        if isinstance(below, str):  # a method without knobs: solver.gptq.damp
            below = {below: {}}
        if not isinstance(below, dict):
            raise InputError(f"{setting}: {step!r} has no keys")
        data[step] = below
        data = below
    data[path[-1]] = value


def sampling_settings(
    *, arguments: Sequence[str], images: str | None, **others: Any
) -> SamplingSettings:
    """How to sample, from the values of ``options.sampling``.

    Args:
        arguments: ``NAME=VALUE`` texts for the pipeline's call.
        images: path of the images for pipelines that take some.
        **others: other fields of :class:`SamplingSettings`.
    """
    return SamplingSettings(**others, pipeline_args=call_arguments(arguments), images=images or "")


def call_arguments(options: Sequence[str]) -> dict[str, Any]:
    """Arguments of the pipeline's call; their values are read as YAML."""
    named = pairs(options, "--arg")
    return {name: parse_yaml(text, f"--arg {name}={text}") for name, text in named}


def listed(options: Sequence[str]) -> list[str]:
    """Words of an option that takes commas and may be repeated."""
    return [word.strip() for option in options for word in option.split(",") if word.strip()]


def pairs(texts: Sequence[str], option: str, form: str = "NAME=VALUE") -> list[tuple[str, str]]:
    """Names and values of an option that takes ``form`` and may be repeated.

    Raises:
        InputError: a text has no equals sign.
    """
    for text in texts:
        if "=" not in text:
            raise InputError(f"{option} {text}: expected {form}")
    return [(name, value) for name, _, value in (text.partition("=") for text in texts)]


def join_workers(output: Path | None, *, silent: bool = False) -> Workers:
    """The processes that share the work; all but the first show no progress bars of libraries.

    Args:
        output: the folder or file that the command writes.
        silent: whether the first one shows none either.

    Raises:
        InputError: there are several, and no folder that all of them see.
    """
    workers = Workers.join()
    if workers.size > 1 and output is None:
        raise InputError("several processes need a folder that all of them see: -o FOLDER")
    if silent or not workers.is_main:
        _hide_progress_bars()
    return workers


def load_verified(model: str, dtype: str, variant: str | None) -> loading.LoadedModel:
    """Load a model; a dtq checkpoint is verified first, so that damage is one clear line.

    Args:
        model: a folder, a bundled name or a hub id.
        dtype: as for ``load_transformers``.
        variant: as for ``load_transformers``.
    """
    path = Path(model)
    if path.is_dir() and contents.folder_kind(path) == "pipeline":
        check_links(path)
        if reader.quantized_components(path):
            reader.verify(path, variant=variant)
    return loading.load_transformer(model, dtype=dtype, variant=variant)


def load_candidate(
    candidate: str, engine: str, reference: str, dtype: str, variant: str | None
) -> tuple[loading.LoadedModel, loading.LoadedModel]:
    """The quantized model of ``dtq eval`` and its float model.

    Args:
        candidate: as for :func:`load_verified`, or a file of an engine.
        engine: key of ``ENGINES``, which runs such a file, or the files in the folder of
            ``dtq quantize --to``.
        reference: as for :func:`load_verified`.
        dtype: as for ``load_transformers``.
        variant: as for ``load_transformers``.

    Raises:
        InputError: no such engine, or its packages are missing; it does not run the file.
        CheckpointError: a file is damaged.
    """
    from dtq.engines.candidate import files_of, is_exported, is_pipeline, run_in
    from dtq.engines.runtimes import find_engine

    found, path = find_engine(engine), Path(candidate)
    if engine == "dtq" and not is_exported(path):
        variants = variants_of((candidate, reference), variant)
        own = load_verified(candidate, dtype, variants[0])
        return own, load_verified(reference, dtype, variants[1])
    files = files_of(found, path)
    source = candidate if is_pipeline(path) else reference
    variants = variants_of((source, reference), variant)
    base = load_verified(source, dtype, variants[0])
    made = run_in(found, base, files, candidate)
    return made, load_verified(reference, dtype, variants[1])


def check_names(target: str, text_encoder: str | None) -> None:
    """Refuse an unknown ``--to`` or ``--text-encoder`` before anything is loaded.

    Raises:
        InputError: there is no such target, or bitsandbytes is not installed.
        RecipeError: there is no such recipe.
    """
    from dtq.recipe import Recipe
    from dtq.recipe.resolve import BNB_NF4, KEEP
    from dtq.stages.text_nf4 import check_nf4

    if target:
        from dtq.engines import find_target

        find_target(target)
    if text_encoder == BNB_NF4:
        check_nf4()
    elif text_encoder not in (None, KEEP):
        Recipe.load(text_encoder)


def source_of(model: str, config: Path | None, dtype: str) -> Any:
    """What to quantize: a file of another engine as a float model, or the name as it is.

    Args:
        model: a folder, a bundled name, a hub id or a file.
        config: folder that ``--config`` names; only for a file.
        dtype: float dtype of what is in a file; ``auto`` is that of the file.

    Raises:
        InputError: ``--config`` is given for something else; the file cannot be read.
    """
    if Path(model).is_file():
        from dtq.engines.load import load_float

        source = load_float(model, config)
        return source if dtype == "auto" else source.to(loading.DTYPES[dtype])
    if config is not None:
        raise InputError(f"--config {config} is for files of other engines, and {model} is none")
    return model


def variants_of(models: Sequence[str], variant: str | None) -> list[str | None]:
    """The variant for each of several models: a local folder without it is read without.

    Args:
        models: folders, bundled names or hub ids.
        variant: what the user asks for.

    Raises:
        InputError: none of the models has the variant.
    """
    local = [demo.path_of(m) for m in models]
    has = [not p.is_dir() or has_variant(model_folders(p).values(), variant) for p in local]
    if not any(has):
        raise InputError(f"neither {' nor '.join(models)} has files of the variant {variant!r}")
    return [variant if each else None for each in has]


def _hide_progress_bars() -> None:
    """Turn the progress bars of diffusers and transformers off until the command ends.

    For JSON output, and in processes whose progress another one shows.
    """
    libraries: list[Any] = [diffusers_logging]
    if is_transformers_available():
        libraries.append(importlib.import_module("transformers.utils.logging"))
    for library in libraries:
        library.disable_progress_bar()
        click.get_current_context().call_on_close(library.enable_progress_bar)
