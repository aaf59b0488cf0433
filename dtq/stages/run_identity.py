# SPDX-License-Identifier: Apache-2.0
"""Hashes of everything that a run depends on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from dtq import demo
from dtq.io.checksum import bytes_digest, checksum, file_digest, folder_digest, path_digest
from dtq.io.package_data import package_root
from dtq.models import is_text_encoder
from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel
from dtq.stages.run import Run


def run_identity(
    runs: Sequence[Run], needs: frozenset[str], statistics: Path | None = None
) -> dict[str, Any]:
    """Everything that the bytes of the result depend on, except the number of threads.

    Args:
        runs: the transformers of one pipeline, with one recipe, and its text encoders.
        needs: statistics that will be collected, keys of ``OBSERVERS``.
        statistics: file of ``dtq calibrate`` that is used instead, for the transformer.
    """
    loaded, recipe = runs[0].loaded, runs[0].recipe
    pipeline, settings = loaded.pipeline, recipe.calibration
    texts = {
        run.loaded.component: run.recipe.to_dict() for run in runs if is_text_encoder(run.model)
    }
    digest = None
    if pipeline is not None and needs and (statistics is None or texts):
        requests = prompts.load(settings.prompts, pipeline, settings.samples)
        digest = bytes_digest(json.dumps([str(entry) for entry in requests.entries]).encode())
    return {
        "model": _model(loaded),
        "components": [run.loaded.component for run in runs],
        "variant": loaded.variant,
        "dtype": str(loaded.dtype),
        "device": next(loaded.model.parameters()).device.type,
        "recipe": recipe.to_dict(),
        "calibration prompts": digest,
        "calibration images": path_digest(Path(settings.images)) if settings.images else None,
        "statistics": None if statistics is None else file_digest(statistics),
        "exclude": list(runs[0].exclude),
        "target": runs[0].target,
        "dtq": folder_digest(package_root(), "*.py"),
        "original names": folder_digest(package_root() / "engines", "*.yaml"),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **({"text encoders": texts, "transformers": version("transformers")} if texts else {}),
    }


def _model(loaded: LoadedModel) -> str:
    """Hash of the files of the model; of its tensors when it came from no folder."""
    where = loaded.path
    if where is None:  # of the hub: a folder in the cache
        name = getattr(loaded.model.config, "_name_or_path", "")  # type: ignore[union-attr]
        if not name:  # not the current folder
            return _tensors(loaded.model)
        cached = Path(str(name))
        where = cached.parent if (cached.parent / "model_index.json").is_file() else cached
        if not (where / "config.json").is_file() and not (where / "model_index.json").is_file():
            return _tensors(loaded.model)
    # demo-outliers is made of the files of demo
    prefix = f"{loaded.name} " if loaded.name in demo.FOLDERS else ""
    return prefix + folder_digest(where)


def _tensors(model: nn.Module) -> str:
    sums = [f"{name} {checksum(tensor)}" for name, tensor in model.state_dict().items()]
    return bytes_digest("\n".join(sums).encode())
