# SPDX-License-Identifier: Apache-2.0
"""The table of ``docs/large.md``: which GPU sizes sample which public pipeline, by offload mode.

    python scripts/fits.py

Needs no weights and no network. ``scripts/fits.json`` holds the configs of the models, with their
sources. An empty config is that of diffusers' class, whose defaults are those of the public model.
Prompts are given as embeddings of zeros, so a text encoder counts with its weights; its activations
for one prompt are small in comparison. Each recipe has two rows: with text encoders in bfloat16, and
with quantized ones.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from dtq.estimate.fake_pipeline import Activations, FakeRun
from dtq.estimate.sampling import (
    SamplingMemory,
    cast_floats,
    peaks,
    quantize_empty,
    tensor_bytes,
)
from dtq.pipelines.contents import text_encoders
from dtq.pipelines.loading import LoadedModel
from dtq.recipe import Recipe
from dtq.recipe.resolve import for_text_encoder
from dtq.stages.plan import plan
from dtq.stages.run import Run

PIPELINES = json.loads(Path(__file__).with_suffix(".json").read_text())["pipelines"]


def own_config(cls: Any) -> bool:
    """Whether a class is one of transformers, which takes a config object."""
    return issubclass(cls, transformers.PreTrainedModel)


def build(entry: dict[str, Any]) -> Any:
    """The pipeline of an entry, its models on the meta device."""
    parts: dict[str, Any] = dict.fromkeys(entry.get("absent", ()))
    library = getattr(diffusers, entry["pipeline"]).__module__.rpartition(".")[0]
    own = importlib.import_module(library)  # of connectors and vocoders
    for name, (kind, config) in entry["models"].items():
        cls = next(getattr(m, kind) for m in (diffusers, own, transformers) if hasattr(m, kind))
        with torch.device("meta"):
            model = cls(cls.config_class(**config)) if own_config(cls) else cls(**config)
        parts[name] = model.eval()
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


def quantize_text(pipeline: Any, recipe: str) -> None:
    """Put quantized layers into every text encoder of a pipeline, which is in bfloat16."""
    for name in text_encoders(pipeline):
        model = getattr(pipeline, name)
        chosen = Recipe.load(recipe)
        run = Run(
            LoadedModel(name, None, name, model), for_text_encoder(chosen, chosen.calibration)
        )
        plan(run)
        quantize_empty(model, run.plan, torch.bfloat16)


def rows(name: str, entry: dict[str, Any], recipe: str, text: str) -> Iterator[list[str]]:
    """Cells of one pipeline in one recipe: with float text encoders, then with quantized ones."""
    pipeline = build(entry)
    quantize(pipeline, recipe)
    pipeline.set_progress_bar_config(disable=True)
    embeds = {k: torch.zeros(v, dtype=torch.bfloat16) for k, v in entry["embeds"].items()}
    masks = {k: torch.ones(v, dtype=torch.long) for k, v in entry.get("masks", {}).items()}
    with FakeRun(pipeline) as run:
        pipeline(**entry["call"], **embeds, **masks, num_inference_steps=2, output_type="pt")
    models = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}
    for part in models:  # it runs in a real call
        if part.startswith("text_encoder"):
            run.activations.components.setdefault(part, 0)
    yield cells(name, recipe or "bfloat16", models, run.activations)
    if text:
        quantize_text(pipeline, text)
        yield cells(name, f"{recipe or 'bfloat16'}, text {text}", models, run.activations)


def cells(
    name: str, recipe: str, models: dict[str, nn.Module], activations: Activations
) -> list[str]:
    """Cells of one row."""
    weights = {n: tensor_bytes(m) for n, m in models.items()}
    found = SamplingMemory(weights, activations, peaks(models, activations))
    denoisers = sum(size for n, size in weights.items() if n.startswith("transformer"))
    texts = sum(size for n, size in weights.items() if n.startswith("text_encoder"))
    live = max(activations.components.values())
    made = [name, recipe, *(f"{n / 1e9:.1f}" for n in (denoisers, texts, live))]
    for mode, peak in found.modes.items():
        made.append(f"{peak / 1e9:.1f} ({next(iter(found.fits(mode)), '-')})")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PIPELINES, help="one pipeline; default: all")
    parser.add_argument("--recipe", action="append", help="default: bfloat16, w8a8, w4a8")
    parser.add_argument("--text-encoder", default="w4a16", help="recipe of the second rows")
    options = parser.parse_args()
    head = ("pipeline", "recipe", "transformers", "text encoders", "activations")
    head += ("none", "model", "group")
    print("| " + " | ".join((*head, "sequential")) + " |")
    print("|" + " --- |" * (len(head) + 1))
    for name, entry in PIPELINES.items():
        if options.only in (None, name):
            for recipe in options.recipe or ("", "w8a8", "w4a8"):
                for row in rows(name, entry, recipe, options.text_encoder):
                    print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
