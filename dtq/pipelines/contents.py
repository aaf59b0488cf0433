# SPDX-License-Identifier: Apache-2.0
"""What a pipeline or a folder contains: its kind, its class, its diffusion transformers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from torch import nn

from dtq.errors import InputError
from dtq.io.safe_parse import read_json
from dtq.pipelines.validation import components, model_kind

Components = str | Sequence[str]
"""``auto``, or the names of one or more components of a pipeline."""


def diffusion_transformers(pipeline: DiffusionPipeline) -> list[str]:
    """Names of the diffusion transformers among the components of a pipeline."""
    names = []
    for name, module in pipeline.components.items():
        plain = getattr(module, "_orig_mod", module)  # of torch.compile, which is refused by name
        if type(plain).__name__ in _transformer_names():
            names.append(name)
    return sorted(names)  # transformer before transformer_2


def diffusion_transformers_on_disk(folder: Path) -> list[str]:
    """Names of the diffusion transformers in the ``model_index.json`` of a pipeline folder."""
    index = components(folder / "model_index.json")
    return sorted(name for name, (_, kind) in index.items() if kind in _transformer_names())


def requested(available: list[str], component: Components, where: object) -> list[str]:
    """The components that the user asks for; ``auto`` is every available one.

    Args:
        available: names of the diffusion transformers.
        component: as the user gave it.
        where: the pipeline or its folder, for errors.

    Raises:
        InputError: ``component`` is empty, or ``auto`` and there is none.
    """
    if component != "auto":
        names = [component] if isinstance(component, str) else list(dict.fromkeys(component))
        if not names:
            raise InputError(
                f"component is empty; name one or more of {', '.join(available) or 'the models'} "
                f"of {where}, or leave it out for every diffusion transformer"
            )
        return names
    if not available:
        raise InputError(
            f"{where} has no diffusion transformer of diffusers; name the model to quantize with "
            f"component="
        )
    return available


@functools.cache
def _transformer_names() -> frozenset[str]:
    """Names of the classes in ``diffusers.models.transformers``."""
    from diffusers.models import transformers

    return frozenset(n for n, kind in vars(transformers).items() if isinstance(kind, type))


def folder_kind(path: Path) -> str:
    """Whether a folder holds a ``pipeline`` or a ``model``.

    Raises:
        InputError: it holds neither; says which file is missing.
    """
    if not path.is_dir():
        raise InputError(
            f"{path} is a file; dtq needs a diffusers folder (with model_index.json). dtq.load "
            f"reads files of other engines, dtq quantize FILE --config FOLDER quantizes them again"
        )
    if (path / "model_index.json").is_file():
        return "pipeline"
    if (path / "config.json").is_file() and "_class_name" in read_json(path / "config.json"):
        return "model"
    raise InputError(
        f"{path} is not a diffusers folder: it has neither model_index.json (a pipeline) nor a "
        f"config.json with _class_name (a model)"
    )


def model_class(folder: Path) -> Any:
    """The diffusers class that a model folder names.

    Raises:
        InputError: the installed diffusers has no such class, or it is not a transformer.
    """
    name = read_json(folder / "config.json").get("_class_name", "")
    kind = model_kind(name)
    if kind is None:
        raise InputError(f"{folder}: diffusers {diffusers.__version__} has no model {name!r}")
    if "UNet" in name or "Autoencoder" in name:
        raise InputError(
            f"{folder}: {name} is not a diffusion transformer; dtq quantizes those only"
        )
    return kind


def component_of(pipeline: DiffusionPipeline, name: str) -> nn.Module:
    """A model of a pipeline by its name.

    Raises:
        InputError: it has no such model; lists those it has.
    """
    model = getattr(pipeline, name, None)
    if not isinstance(model, nn.Module):
        models = [n for n, m in pipeline.components.items() if isinstance(m, nn.Module)]
        raise InputError(
            f"{type(pipeline).__name__} has no {name!r}; its models are {', '.join(models)}. dtq "
            f"quantizes diffusion transformers: choose one with component="
        )
    return model
