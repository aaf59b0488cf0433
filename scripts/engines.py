# SPDX-License-Identifier: Apache-2.0
"""Calibrated files against the engine's own data-free quantizer, both run by the engine on the CPU.

``python scripts/engines.py`` prints the table of docs/engines/README.md. Both files have
the same layers in the same layouts, so the same bytes. The error is teacher-forced: each model runs on the
inputs that the float model had, and the squared error of its output is divided by the output's square. The
interval is a bootstrap over prompts, paired.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import dtq
from dtq.engines import TARGETS
from dtq.engines.runtimes import run_by
from dtq.models.linears import matrix_of
from dtq.nn import QuantLinear
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.recorded_calls import RecordedCall, replay
from dtq.pipelines.recording import sample_calls
from dtq.pipelines.settings import SamplingSettings

MODELS = ("demo", "demo-outliers")
ENGINE = ("comfy-int8", "comfy-w4a8", "comfy-w4a4")
LAYOUTS = {
    "int8-row": ("TensorWiseINT8Layout", {"per_channel": True}),
    "lut4-2l-g16": ("AsymW4A8Int8Layout", {}),
    "int4-narrow-row": ("TensorCoreConvRotW4A4Layout", {}),
}
"""By weight format: the layout of comfy-kitchen, and the options of its quantizer."""


def data_free(made: nn.Module, floats: nn.Module) -> nn.Module:
    """The float model in the layouts of ``made``, quantized by comfy-kitchen; in place."""
    from comfy_kitchen.tensor import QuantizedTensor

    for name, layer in list(made.named_modules()):
        if not isinstance(layer, QuantLinear):
            continue
        layout, options = LAYOUTS[layer.weight_format]
        block = layer.spec.hadamard_block_size
        if block > 1:
            options = {**options, "convrot_groupsize": block}
            if layer.weight_format == "int8-row":
                options["convrot"] = True
        old = floats.get_submodule(name)
        weight = QuantizedTensor.from_float(matrix_of(old).detach().float(), layout, **options)
        if layer.activation_format == "none":
            weight = weight.dequantize()
        old.weight = nn.Parameter(weight, requires_grad=False)
    return floats


def errors_by_prompt(model: nn.Module, calls: list[RecordedCall], prompts: int) -> Tensor:
    """Mean over calls of the relative squared error of each prompt (P,)."""
    total = torch.zeros(prompts, dtype=torch.float64)
    for call in calls:
        want = call.output.double().flatten(1)
        wrong = (replay(model, call).double().flatten(1) - want).square().sum(1)
        # guidance runs each prompt twice, one half after the other
        total += (wrong.reshape(-1, prompts).sum(0)) / want.square().sum(1).reshape(
            -1, prompts
        ).sum(0)
    return total / len(calls)


def ratio(ours: Tensor, theirs: Tensor, draws: int = 10_000) -> tuple[float, float, float]:
    """Ratio of mean errors, and its 95 % interval over prompts."""
    g = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(ours), (draws, len(ours)), generator=g)
    drawn = ours[chosen].mean(1) / theirs[chosen].mean(1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return float(ours.mean() / theirs.mean()), low, high


def row(name: str, target: str, samples: int, steps: int) -> str:
    settings = SamplingSettings(samples=samples, steps=steps, batch_size=samples, seed=1)
    calls = sample_calls(load_transformer(name), settings, samples)
    recipe = TARGETS[target].limits.recipe
    calibration = {"samples": 32, "steps": 10}
    made = dtq.quantize(name, recipe, to=target, progress=False, calibration=calibration)
    made = getattr(made, "transformer", made)
    with tempfile.TemporaryDirectory() as folder:
        report = dtq.export(made, target, Path(folder, "model.safetensors"))
        ours = errors_by_prompt(
            run_by("comfy-kitchen", report.file, load_transformer(name).model), calls, samples
        )
    plain = data_free(made, load_transformer(name).model)
    theirs = errors_by_prompt(plain, calls, samples)
    value, low, high = ratio(ours, theirs)
    cells = f"{float(ours.mean()):.3g} | {float(theirs.mean()):.3g} | {value:.2f} ({low:.2f} to {high:.2f})"
    return f"| `{name}` | `{target}` | {cells} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--targets", nargs="+", default=ENGINE)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    print("| model | target | calibrated | data-free | ratio (95 % interval) |")
    print("| --- | --- | ---: | ---: | --- |")
    for each in options.models:
        for engine in options.targets:
            print(row(each, engine, options.samples, options.steps), flush=True)
