# SPDX-License-Identifier: Apache-2.0
"""Hashes of everything that a run depends on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from dtq import demo
from dtq.io.checksum import bytes_digest, checksum, file_digest, folder_digest, path_digest
from dtq.io.package_data import package_root
from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel
from dtq.recipe.resolve import Recipe


def run_identity(
    sources: Sequence[LoadedModel],
    recipe: Recipe,
    needs: frozenset[str],
    skip: Sequence[str] = (),
    statistics: Path | None = None,
) -> dict[str, Any]:
    """What the bytes of the result depend on, apart from the number of threads.

    Args:
        sources: the opened transformers.
        recipe: what to do.
        needs: statistics that are asked for.
        skip: layers to keep.
        statistics: a file from ``dtq calibrate`` that has them.
    """
    pipeline, how = sources[0].pipeline, recipe.calibration
    entries = None
    if pipeline is not None and needs and statistics is None:
        entries = [str(entry) for entry in prompts.load(how.prompts, pipeline, how.samples).entries]
    pictures = Path(how.images) if how.images else None
    return {
        "model": _model(sources[0]),
        "components": [source.component for source in sources],
        "dtype": str(sources[0].dtype),
        "device": next(sources[0].model.parameters()).device.type,
        "recipe": recipe.to_dict(),
        "calibration prompts": None
        if entries is None
        else bytes_digest(json.dumps(entries).encode()),
        "calibration images": None if pictures is None else path_digest(pictures),
        "statistics": None if statistics is None else file_digest(statistics),
        "exclude": list(skip),
        "dtq": folder_digest(package_root(), "*.py"),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def _model(loaded: LoadedModel) -> str:
    """Hash of the files of the model; of its tensors when it came from no folder."""
    where = loaded.path
    if where is None:  # of the hub: a folder in the cache
        cached = Path(str(getattr(loaded.model.config, "_name_or_path", "")))  # type: ignore[union-attr]
        where = cached.parent if (cached.parent / "model_index.json").is_file() else cached
        if not (where / "config.json").is_file() and not (where / "model_index.json").is_file():
            return _tensors(loaded.model)
    # demo-outliers is made of the files of demo
    return (
        f"{loaded.name} {folder_digest(where)}"
        if loaded.name in demo.FOLDERS
        else folder_digest(where)
    )


def _tensors(model: nn.Module) -> str:
    sums = [f"{name} {checksum(tensor)}" for name, tensor in model.state_dict().items()]
    return bytes_digest("\n".join(sums).encode())
