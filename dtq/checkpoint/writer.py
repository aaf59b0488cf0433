# SPDX-License-Identifier: Apache-2.0
"""Write a quantized model or pipeline as a diffusers folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from dtq.checkpoint.model_card import card
from dtq.io.atomic import atomic_directory
from dtq.io.safe_parse import read_json
from dtq.pipelines import call_defaults


def write(saveable: Any, out: str | Path, *, overwrite: bool = False, shard: str = "10GB") -> Path:
    """Save a quantized pipeline or model so that ``out`` appears whole or not at all.

    Args:
        saveable: anything with ``save_pretrained``.
        out: folder to make.
        overwrite: replace a folder that is not empty.
        shard: largest file, as diffusers writes sizes.

    Raises:
        InputError: the folder is not empty, or cannot be made.
    """
    out = Path(out)
    with atomic_directory(out, overwrite=overwrite) as side:
        save_into(saveable, side, shard)
    return out


def save_into(
    saveable: Any,
    folder: Path,
    shard: str = "10GB",
    reports: Mapping[str, dict[str, Any]] | None = None,
    decodes: Mapping[str, Any] | None = None,
    outcome: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Save into an empty folder, with a model card and without the path of the original model.

    Args:
        saveable: a pipeline or model, anything with ``save_pretrained``.
        folder: is filled.
        shard: size of the largest file, in the notation of diffusers.
        reports: of ``dtq quantize`` by component, for the model card.
        decodes: what ``--vae`` changed, likewise.
        outcome: of the budget of a pipeline (``dtq.stages.pipeline_sizes``), likewise.

    Returns:
        ``bytes`` of all weight files, and for each of ``components`` its ``bytes``, ``error`` and
        ``error_share`` (None where no budget has measured them); also ``budget``, if there is one.
    """
    saveable.save_pretrained(folder, safe_serialization=True, max_shard_size=shard)
    for config in [*folder.glob("*.json"), *folder.glob("*/config.json")]:
        drop_name_or_path(config)
    if isinstance(saveable, DiffusionPipeline):
        call_defaults.write(folder, call_defaults.of(saveable))
    if getattr(saveable, "labels", None):
        _keep_class_labels(saveable.labels, folder / "model_index.json")
    written = _written(folder, outcome or {})
    readme = folder / "README.md"
    readme.write_text(card(saveable, reports, decodes, written), encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        shutil.copymode(readme, file)  # the safetensors writer leaves its files private
    return written


def _written(folder: Path, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`save_into` returns."""
    files: Counter[str] = Counter()
    for file in sorted(folder.rglob("*.safetensors")):
        files[file.relative_to(folder).parts[0]] += file.stat().st_size
    total, budget = files.total(), outcome.get("budget")
    measured = outcome.get("components", {})
    unknown = {"error": None, "error_share": None}
    parts = {n: {**unknown, **measured.get(n, {}), "bytes": size} for n, size in files.items()}
    return {**({} if budget is None else {"budget": budget}), "bytes": total, "components": parts}


def _keep_class_labels(labels: Mapping[str, int], index: Path) -> None:
    """Add ``id2label`` to the index: ``DiTPipeline`` takes it and does not save it."""
    names: dict[str, list[str]] = {}
    for name, number in labels.items():
        names.setdefault(str(number), []).append(name)
    data = read_json(index)
    data["id2label"] = {number: ", ".join(every) for number, every in names.items()}
    index.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def drop_name_or_path(config: Path) -> None:
    """Remove ``_name_or_path``, which publishes a local path and differs between equal models."""
    data = read_json(config)
    if data.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
