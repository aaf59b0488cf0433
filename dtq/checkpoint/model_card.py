# SPDX-License-Identifier: Apache-2.0
"""The model card: what a folder holds, how to load it, what was measured. No dates, no paths."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dtq.checkpoint.config import DTQConfig
from dtq.models.linears import is_linear, matrix_shape, shape_of
from dtq.nn.conv import QuantConv
from dtq.nn.embedding import QuantEmbedding, tied_to_tables
from dtq.nn.linear import QuantLinear
from dtq.nn.weight_only import WeightOnly

_HUB = re.compile(r"\w[\w.-]*/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots")


def card(
    saveable: Any,
    reports: Mapping[str, dict[str, Any]] | None = None,
    decodes: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
) -> str:
    """The text of ``README.md`` for a quantized pipeline or model.

    Args:
        saveable: the pipeline or model.
        reports: ``Report.to_json()`` of the run that made it, by component.
        decodes: of ``dtq.stages.autoencoder``, if the autoencoder was quantized too.
        files: of ``dtq.checkpoint.writer.save_into``: bytes and share of the error by component.
    """
    models = _quantized(saveable)
    configs = [_config(model) for model in models.values()]
    bases = sorted({c.extra["base_model"] for c in configs if "base_model" in c.extra})
    recipes = sorted({c.recipe for c in configs})
    lines = ["---"]
    if bases:
        lines += ["base_model:", *(f"- {base}" for base in bases), "base_model_relation: quantized"]
    lines += ["library_name: diffusers", "tags:", "- dtq", "- quantized", "---", ""]
    of = f" of {', '.join(bases)}" if bases else ""
    lines += [f"# {', '.join(recipes)}{of}", "", "Quantized after training by dtq.", ""]
    lines += _table(models)
    if files and len(files["components"]) > 1:
        lines += ["", *_files(files)]
    for name in _of_bitsandbytes(saveable):
        lines += ["", f"`{name}` is stored in NF4 of bitsandbytes, which has to be installed."]
    lines += ["", "```python", *_loading(saveable), "```"]
    if reports:
        lines += ["", "Measured while quantizing; `dtq_report.json` has every layer:", ""]
        for name, report in reports.items():
            of = f"`{name}`: " if len(reports) > 1 else ""
            lines += [f"- {of}{line}" for line in _measured(report)]
        if decodes:
            psnr = decodes["psnr"]
            changed = "the same decodes" if psnr is None else f"PSNR of its decodes {psnr:.1f} dB"
            lines.append(f"- `vae`: {changed}, against the float autoencoder")
    return "\n".join(lines) + "\n"


def hub_id(where: str) -> str | None:
    """The hub id in the name or cache path of a loaded model, None for another folder."""
    if cached := _CACHED.search(where):
        return "/".join(cached.groups())
    return where if _HUB.fullmatch(where) and not Path(where).exists() else None


def _quantized(saveable: Any) -> dict[str, nn.Module]:
    components = getattr(saveable, "components", {"": saveable})
    return {
        name: model
        for name, model in components.items()
        if isinstance(model, nn.Module)
        and any(isinstance(m, QuantLinear | WeightOnly) for m in model.modules())
    }


def _of_bitsandbytes(saveable: Any) -> list[str]:
    models = {n: m for n, m in getattr(saveable, "components", {}).items() if m is not None}
    return sorted(n for n, m in models.items() if getattr(m, "is_loaded_in_4bit", False))


def _config(model: nn.Module) -> DTQConfig:
    config: DTQConfig = model.config.quantization_config  # type: ignore[assignment, union-attr]
    return config


def _table(models: dict[str, nn.Module]) -> list[str]:
    lines = [
        "| model | recipe | quantized linears | weights | inputs | bits per weight "
        "| dtype of other tensors |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in models.items():
        twins = tied_to_tables(model)
        own = [module for name, module in model.named_modules() if name not in twins]
        layers = [m for m in own if isinstance(m, QuantLinear | WeightOnly)]
        linears = sum(isinstance(m, QuantLinear) for m in layers)
        every = sum(is_linear(m) for m in model.modules())
        convolutions = sum(isinstance(m, QuantConv) for m in layers)
        more = f", {convolutions} convolutions" if convolutions else ""
        tables = sum(isinstance(m, QuantEmbedding) for m in layers)
        more += f", {tables} table{'s' if tables > 1 else ''} of embeddings" if tables else ""
        size = sum(spec.nbytes for m in layers for spec in m.tensor_specs().values())
        shapes = (matrix_shape(m) if isinstance(m, WeightOnly) else shape_of(m) for m in layers)
        count = sum(map(math.prod, shapes))
        title = f"`{name}`, {type(model).__name__}" if name else type(model).__name__
        config = _config(model)
        lines.append(
            f"| {title} | `{config.recipe}` | {linears} of {every}{more} "
            f"| {_most(m.weight_format for m in layers)} "
            f"| {_most(m.activation_format for m in layers)} "
            f"| {8 * size / count:.2f} | {str(config.compute_dtype).removeprefix('torch.')} |"
        )
    return lines


def _files(files: Mapping[str, Any]) -> list[str]:
    """Bytes of every component, and what it adds to the error where a budget has measured it."""
    head = "| component | bytes of its files | share |"
    measured = "budget" in files
    more = " error of a step | share of the error |" if measured else ""
    lines = [head + more, "| --- |" + " ---: |" * (4 if measured else 2)]
    for name, part in files["components"].items():
        known = part["error"] is not None
        error = f" {part['error']:.1e} |" if known else " not measured |"
        share = f" {part['error_share']:.0%} |" if part["error_share"] is not None else " |"
        lines.append(
            f"| `{name}` | {part['bytes']} | {part['bytes'] / files['bytes']:.0%} |"
            + (error + share if measured else "")
        )
    of = f" of a budget of {files['budget']}" if measured else ""
    if measured and (over := files["bytes"] - files["budget"]) > 0:
        of += f", {over} too many: the sanity check promoted layers after it was spent"
    return [*lines, "", f"Together {files['bytes']} bytes{of}."]


def _most(words: Any) -> str:
    return ", ".join(f"{n} `{word}`" for word, n in Counter(words).most_common())


def _loading(saveable: Any) -> list[str]:
    kind = type(saveable).__name__ if isinstance(saveable, nn.Module) else "DiffusionPipeline"
    name = "model" if isinstance(saveable, nn.Module) else "pipe"
    return [
        "import dtq  # teaches diffusers to load it",
        f"from diffusers import {kind}",
        "",
        f'{name} = {kind}.from_pretrained("this repository or folder")',
    ]


def _measured(report: dict[str, Any]) -> list[str]:
    if not report["layers"]:
        return ["stays float, for which the budget had room"]
    errors = {x["name"]: x["error"] for x in report["layers"] if x["error"] is not None}
    lines = [f"calibration inputs: {report['calibration'].get('origin', 'none')}"]
    if errors:
        mean = math.exp(sum(math.log(max(e, 1e-12)) for e in errors.values()) / len(errors))
        worst = max(errors, key=lambda name: errors[name])
        lines.append(
            f"relative squared error of a layer's output: {mean:.1e} in the geometric mean, "
            f"{errors[worst]:.1e} at worst (`{worst}`)"
        )
    for x in report.get("sanity_check", {}).get("promoted", []):
        lines.append(f"promoted to {x['to']} in the sanity check: `{x['layer']}`, {x['why']}")
    return lines
