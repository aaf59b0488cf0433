# SPDX-License-Identifier: Apache-2.0
"""Calibrated files against the engine's own data-free quantizer, and against dtq's own formats.

    python scripts/engines
    python scripts/engines --models demo --recipes gguf-q4 torchao-w8a8
    python scripts/engines --lost

The first prints the table of docs/engines/README.md, "What calibration gains": both files have the
same layers in the same layouts, so the same bytes, and the engine runs both on the CPU. ``--lost``
prints the table of "What is lost": the same files against a recipe of dtq's own formats.

The error is teacher-forced: each model runs on the inputs that the float model had, and the squared
error of its output is divided by the output's square. The interval is a bootstrap over prompts,
paired. No layer is promoted by the sanity check, so that both files have the same layouts. Every
row, and the statistics and calls of a model, are kept in ``--out``; delete it to measure again. A
row whose packages are missing says so.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from quantizers import QUANTIZERS, file_of
from torch import Tensor, nn

import dtq
from dtq.api import open_runs
from dtq.calibrate import store
from dtq.calibrate.collection import Statistics
from dtq.calibrate.observers import OBSERVERS
from dtq.io.atomic import atomic_replace, atomic_write
from dtq.pipelines.loading import load_transformer, load_transformers
from dtq.pipelines.recorded_calls import RecordedCall, replay
from dtq.pipelines.recording import sample_calls
from dtq.pipelines.settings import SamplingSettings
from dtq.recipe import Recipe
from dtq.stages.calibrate import collect
from dtq.stages.plan import plan

MODELS = ("demo", "demo-outliers", "demo-video")
LOST = ("demo", "demo-outliers")
"""The models of the other table."""
OWN = {
    "convrot-w8a8": ("comfy-int8", "w8a8"),
    "convrot-w4a8": ("comfy-w4a8", "w4a8"),
    "convrot-w4a4": ("comfy-w4a4", "w4a4"),
    "comfy-nvfp4": ("comfy-nvfp4", "nvfp4"),
    "comfy-fp8": ("comfy-fp8", "w8a8"),
    "svdquant-w4a4": ("comfy-svdquant", "w4a4"),
    "svdquant-w4a4@nunchaku-lite": ("nunchaku-lite", "w4a4"),
    "gguf-q4": ("gguf", "w4a16"),
    "gguf-q3": ("gguf", "w3a8"),
    "gguf-q2": ("gguf", "w3a8"),
    "torchao-w8a8": ("torchao", "w8a8"),
    "torchao-w4a8": ("torchao", "w4a8"),
    "modelopt-fp8": ("modelopt", "w8a8"),
    "onnx-w8a8": ("onnx", "w8a8"),
    "onnx-w4a16": ("onnx", "w4a16"),
    "openvino-w8a8": ("openvino", "w8a8"),
    "openvino-w4a16": ("openvino", "w4a16"),
}
"""By recipe, with ``@`` and the target if it has several: the target, and the recipe of dtq's own
formats that is nearest in bits. The latter gets 8-bit modulation, as nearly all targets have it.
"""
SAME = {
    "onnx-w8a8": "torchao-w8a8",
    "openvino-w8a8": "torchao-w8a8",
    "openvino-w4a16": "onnx-w4a16",
}
"""Recipes with the keys of another one, which are measured once with dtq's layers."""


@dataclass
class Case:
    """A model with what all its rows share.

    Attributes:
        name: of the model.
        samples: prompts that the errors are means over.
        steps: of their sampling.
        calibration: images of the calibration.
        folder: where its statistics and calls are kept.
    """

    name: str
    samples: int
    steps: int
    calibration: int
    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / f"{self.name}-{name}"

    @property
    def settings(self) -> dict[str, int]:
        return {"samples": self.calibration, "steps": 10}

    @cached_property
    def calls(self) -> list[RecordedCall]:
        """Calls of the float model, on seeds and noise that were not calibrated on."""
        file = self.file("calls.pt")
        if not file.is_file():
            settings = SamplingSettings(
                samples=self.samples, steps=self.steps, batch_size=self.samples, seed=1
            )
            calls = sample_calls(load_transformer(self.name), settings, self.samples)
            atomic_replace(file, lambda draft: torch.save(calls, draft))
        return torch.load(file, weights_only=False)

    @cached_property
    def statistics(self) -> Statistics:
        """Of the calibration, for every recipe."""
        file = self.file("statistics.safetensors")
        if not file.is_file():
            recipe = Recipe.load("w8a8", calibration=self.settings)
            run = open_runs(load_transformers(self.name), recipe, progress=False)[0]
            plan(run)
            store.save(collect(run, frozenset(OBSERVERS)), file)
        return store.load(file)

    def quantize(self, recipe: str, to: str = "", **overrides: str) -> nn.Module:
        made = dtq.quantize(
            self.name, recipe, to=to, progress=False, sanity_check=False,
            statistics=self.statistics, calibration=self.settings, **overrides,
        )  # fmt: skip
        return getattr(made, "transformer", made)

    def errors(self, model: nn.Module) -> Tensor:
        """Mean over calls of the relative squared error of each prompt (P,)."""
        total = torch.zeros(self.samples, dtype=torch.float64)
        for call in self.calls:
            want = call.output.double().flatten(1)
            wrong = (replay(model, call).double().flatten(1) - want).square().sum(1)
            # guidance runs each prompt twice, one half after the other
            halves, sizes = (
                x.reshape(-1, self.samples).sum(0) for x in (wrong, want.square().sum(1))
            )
            total += halves / sizes
        return total / len(self.calls)


def ratio(ours: Tensor, theirs: Tensor, draws: int = 10_000) -> tuple[float, float, float]:
    """Ratio of mean errors, and its 95 % interval over prompts."""
    g = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(ours), (draws, len(ours)), generator=g)
    drawn = ours[chosen].mean(1) / theirs[chosen].mean(1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return float(ours.mean() / theirs.mean()), low, high


def gained(case: Case, recipe: str) -> dict[str, Any]:
    """The file of a recipe, and the same layers quantized by the engine's own quantizer.

    The same numbers run by dtq are a row of :func:`lost`, which is kept on the way.
    """
    quantizer, (target, _) = QUANTIZERS[recipe], OWN[recipe]
    made = case.quantize(recipe, target, **quantizer.overrides)
    if case.name in LOST and not quantizer.overrides:
        kept(case.file(f"{recipe}-lost.json"), by_dtq, case, made)
    with tempfile.TemporaryDirectory() as folder:
        path = file_of(target, Path(folder, "ours"))
        dtq.export(made, target, path, names="diffusers")
        floats = load_transformer(case.name).model
        calibrated = quantizer.run(path, floats)
        nbytes = [quantizer.nbytes(calibrated, path)]
        ours = case.errors(calibrated)
        path = file_of(target, Path(folder, "theirs"))
        plain = quantizer.make(made, floats, path)
        nbytes.append(quantizer.nbytes(plain, path))
        if nbytes[0] != nbytes[1]:
            raise SystemExit(f"{recipe}: the files have {nbytes} bytes, so they cannot be compared")
        theirs = case.errors(plain)
    return {"ours": ours.tolist(), "theirs": theirs.tolist(), "bytes": nbytes[0]}


def by_dtq(case: Case, made: nn.Module) -> dict[str, Any]:
    """A quantized model run by dtq: within 1.01 times the engine's own error."""
    plan = made.hf_quantizer.report.plan
    return {"ours": case.errors(made).tolist(), "bits": plan.bits(plan.gemm())}


def lost(case: Case, recipe: str) -> dict[str, Any]:
    """The numbers of a recipe's file, or of a recipe of dtq's own formats."""
    if recipe in OWN:
        made = case.quantize(recipe.partition("@")[0], OWN[recipe][0])
    else:
        made = case.quantize(recipe, modulation="w8a16")
    return by_dtq(case, made)


def kept(file: Path, measure: Any, *args: Any) -> dict[str, Any]:
    """A row from its file, or measured now."""
    if not file.is_file():
        atomic_write(file, json.dumps(measure(*args)) + "\n")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def gained_row(case: Case, recipe: str) -> str:
    start = f"| `{case.name}` | `{OWN[recipe][0]}` | `{recipe}` |"
    file = case.file(f"{recipe}-gained.json")
    if not file.is_file() and (missing := QUANTIZERS[recipe].missing):
        return f"{start} | | needs {', '.join(missing)} |"
    found = kept(file, gained, case, recipe)
    ours, theirs = (torch.tensor(found[key], dtype=torch.float64) for key in ("ours", "theirs"))
    value, low, high = ratio(ours, theirs)
    cells = f"{float(ours.mean()):.3g} | {float(theirs.mean()):.3g} | {value:.2f} ({low:.2f} to {high:.2f})"
    return f"{start} {cells} |"


def lost_row(case: Case, recipe: str) -> str:
    target, own = OWN[recipe]
    names = SAME.get(recipe, recipe), own
    pair = [kept(case.file(f"{name}-lost.json"), lost, case, name) for name in names]
    a, b = (torch.tensor(each["ours"], dtype=torch.float64) for each in pair)
    value, low, high = ratio(a, b)
    start = f"| `{case.name}` | `{target}` | `{recipe.partition('@')[0]}` | {pair[0]['bits']:.2f} |"
    cells = f"{float(a.mean()):.3g} | {value:.2f} ({low:.2f} to {high:.2f})"
    return f"{start} `{own}` | {pair[1]['bits']:.2f} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--recipes", nargs="+", default=None)
    parser.add_argument("--lost", action="store_true", help="compare with dtq's own formats")
    parser.add_argument("--samples", type=int, default=32, help="prompts of the errors")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--calibration", type=int, default=32, help="images of the calibration")
    parser.add_argument(
        "--out", type=Path, default=Path(".bench/engines"), help="folder of the rows"
    )
    options = parser.parse_args()
    conditions = f"{options.samples}-{options.steps}-{options.calibration}"
    out = options.out / conditions
    out.mkdir(parents=True, exist_ok=True)
    cases = [
        Case(name, options.samples, options.steps, options.calibration, out)
        for name in options.models or (LOST if options.lost else MODELS)
    ]
    if options.lost:
        print(
            "| model | target | recipe | bits | dtq's own | its bits | error | ratio (95 % interval) |"
        )
        print("| --- | --- | --- | ---: | --- | ---: | ---: | --- |")
        for case in cases:
            for recipe in options.recipes or OWN:
                print(lost_row(case, recipe), flush=True)
        return
    print("| model | target | recipe | calibrated | data-free | ratio (95 % interval) |")
    print("| --- | --- | --- | ---: | ---: | --- |")
    for case in cases:
        for recipe in options.recipes or QUANTIZERS:
            print(gained_row(case, recipe), flush=True)


if __name__ == "__main__":
    main()
