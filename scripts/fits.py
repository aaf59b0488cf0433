# SPDX-License-Identifier: Apache-2.0
"""The table of ``docs/large.md``: which GPU sizes sample which public pipeline, by offload mode.

    python scripts/fits.py

Needs no weights and no network. ``scripts/fits.json`` holds the configs of the models, with their
sources. An empty config is that of diffusers' class, whose defaults are those of the public model.
Prompts are given as embeddings of zeros, so a text encoder counts with its weights; its activations
for one prompt are small in comparison. Text encoders are in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from dtq.estimate.fake_pipeline import FakeRun
from dtq.estimate.sampling import (
    SamplingMemory,
    cast_floats,
    peaks,
    quantize_empty,
    tensor_bytes,
)
from dtq.pipelines.loading import LoadedModel
from dtq.recipe import Recipe
from dtq.stages.plan import plan
from dtq.stages.run import Run

PIPELINES = json.loads(Path(__file__).with_suffix(".json").read_text())["pipelines"]


def build(entry: dict[str, Any]) -> Any:
    """The pipeline of an entry, its models on the meta device."""
    parts: dict[str, Any] = dict.fromkeys(entry.get("absent", ()))
    for name, (kind, config) in entry["models"].items():
        with torch.device("meta"):
            if hasattr(diffusers, kind):
                parts[name] = getattr(diffusers, kind)(**config).eval()
            else:
                cls = getattr(transformers, kind)
                parts[name] = cls(cls.config_class(**config)).eval()
    scheduler, options = entry["scheduler"]
    parts["scheduler"] = getattr(diffusers, scheduler)(**options)
    return getattr(diffusers, entry["pipeline"])(**parts, **entry.get("options", {}))


def quantize(pipeline: Any, recipe: str) -> None:
    """Put quantized layers into every denoiser of a pipeline, as ``dtq plan`` plans them."""
    for name, model in pipeline.components.items():
        if isinstance(model, nn.Module):
            layers = None
            if name.startswith("transformer") and recipe:
                loaded = LoadedModel(name, None, name, model)
                run = Run(loaded, Recipe.load(recipe), exclude=(), memory=2**33)
                plan(run)
                layers = run.plan
            cast_floats(model, torch.bfloat16)
            if layers is not None:
                quantize_empty(model, layers, torch.bfloat16)


def row(name: str, entry: dict[str, Any], recipe: str) -> list[str]:
    """Cells of one pipeline in one recipe."""
    pipeline = build(entry)
    quantize(pipeline, recipe)
    pipeline.set_progress_bar_config(disable=True)
    embeds = {k: torch.zeros(v, dtype=torch.bfloat16) for k, v in entry["embeds"].items()}
    masks = {k: torch.ones(v, dtype=torch.long) for k, v in entry.get("masks", {}).items()}
    with FakeRun(pipeline) as run:
        pipeline(**entry["call"], **embeds, **masks, num_inference_steps=2, output_type="pt")
    models = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}
    for text in models:  # it runs in a real call
        if text.startswith("text_encoder"):
            run.activations.components.setdefault(text, 0)
    weights = {n: tensor_bytes(m) for n, m in models.items()}
    found = SamplingMemory(weights, run.activations, peaks(models, run.activations))
    denoisers = sum(size for n, size in weights.items() if n.startswith("transformer"))
    live = max(run.activations.components.values())
    cells = [name, recipe or "bfloat16", f"{denoisers / 1e9:.1f}", f"{live / 1e9:.1f}"]
    for mode, peak in found.modes.items():
        cells.append(f"{peak / 1e9:.1f} ({next(iter(found.fits(mode)), '-')})")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PIPELINES, help="one pipeline; default: all")
    parser.add_argument("--recipe", action="append", help="default: bfloat16, w8a8, w4a8")
    options = parser.parse_args()
    head = ("pipeline", "transformer", "its GB", "activations", "none", "model", "group")
    print("| " + " | ".join((*head, "sequential")) + " |")
    print("|" + " --- |" * (len(head) + 1))
    for name, entry in PIPELINES.items():
        if options.only in (None, name):
            for recipe in options.recipe or ("", "w8a8", "w4a8"):
                print("| " + " | ".join(row(name, entry, recipe)) + " |", flush=True)


if __name__ == "__main__":
    main()
