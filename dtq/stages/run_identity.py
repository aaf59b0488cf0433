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
from dtq.io.checksum import _contents, _digest_of, _sha, _sha_of, checksum
from dtq.io.package_data import package_root
from dtq.pipelines import prompts
from dtq.pipelines.loading import Source
from dtq.recipe.resolve import Recipe


def inputs_of(
    sources: Sequence[Source],
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
        entries = [str(entry) for entry in prompts.load(how.set, pipeline, how.samples).entries]
    pictures = Path(how.images) if how.images else None
    return {
        "model": _model(sources[0]),
        "components": [source.component for source in sources],
        "dtype": str(sources[0].dtype),
        "device": next(sources[0].model.parameters()).device.type,
        "recipe": recipe.to_dict(),
        "calibration set": None if entries is None else _sha(json.dumps(entries).encode()),
        "calibration pictures": None if pictures is None else _contents(pictures),
        "statistics": None if statistics is None else _sha_of(statistics),
        "keep": list(skip),
        "dtq": _digest_of(package_root(), "*.py"),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def _model(source: Source) -> str:
    """Hash of the files of the model; of its tensors when it came from no folder."""
    where = source.path
    if where is None:  # of the hub: a folder in the cache
        cached = Path(str(getattr(source.model.config, "_name_or_path", "")))  # type: ignore[union-attr]
        where = cached.parent if (cached.parent / "model_index.json").is_file() else cached
        if not (where / "config.json").is_file() and not (where / "model_index.json").is_file():
            return _tensors(source.model)
    # demo-hard is made of the files of demo
    return (
        f"{source.name} {_digest_of(where)}" if source.name in demo.FOLDERS else _digest_of(where)
    )


def _tensors(model: nn.Module) -> str:
    sums = [f"{name} {checksum(tensor)}" for name, tensor in model.state_dict().items()]
    return _sha("\n".join(sums).encode())
