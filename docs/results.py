# SPDX-License-Identifier: Apache-2.0
"""Measure the tables of docs/results.md: ``make results``.

Every row of a table sees the same recorded inputs of the float model, in one process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from dtq.calibrate import sets
from dtq.evaluate import baselines, drift
from dtq.evaluate.run import compare_pictures, row_of, stored_bits
from dtq.nn import QuantLinear
from dtq.quantize import calibrate_source, plan_source, quantize_source
from dtq.recipe import Calibration, Recipe
from dtq.source import open_source

EVERYTHING = frozenset({"channels", "gram", "reservoir"})
RECIPES = ("w8a8", "w4a8", "rtn-w4a8")
ABLATIONS = {
    "w4a8, no transform": {"transform": "none"},
    "w4a8, smoothing 0.5 alone": {"transform": "smooth"},
    "w4a8, rotation alone": {"transform": "hadamard"},
    "w4a8, clip search instead of GPTQ": {"solver": "search"},
    "w4a8, modulation w4a16": {"modulation": "w4a16"},
    "w4a8, activations int8-step": {"acts": "int8-step"},
}


def measure(name: str, samples: int, calibration: int) -> list[dict]:
    """All rows for one model."""
    how = Calibration(samples=samples, steps=20, batch=8, seed=1000)
    float_model = open_source(name)
    requests = sets.load("auto", float_model.pipeline, how.samples)
    truth = drift.record(float_model.pipeline, float_model.model, requests, how)
    recipe = Recipe.load("w4a8", calibration={"samples": calibration})
    scan, _ = plan_source(float_model, recipe)
    stats = calibrate_source(float_model, scan, recipe, EVERYTHING)
    rows, layers = [], []
    variants = {r: (r, {}) for r in RECIPES} | {k: ("w4a8", v) for k, v in ABLATIONS.items()}
    for label, (base, changes) in variants.items():
        opened = open_source(name)
        chosen = Recipe.load(base, **changes)
        report = quantize_source(opened, chosen, statistics=stats, progress=False)
        row = row_of(label, drift.teacher_forced(truth, opened.model))
        row.bits = stored_bits(opened.model)
        if not changes:
            ran = drift.record(opened.pipeline, opened.model, requests, how)
            compare_pictures(row, truth, ran)
        if label == "w4a8":
            layers = [
                n
                for n, m in opened.model.named_modules()
                if isinstance(m, QuantLinear) and m.acts != "none"
            ]
        rows.append(
            {
                "model": name,
                "row": label,
                "error": row.error,
                "bits": row.bits,
                "psnr": row.psnr,
                "promoted": sum(x.promoted for x in report.layers),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    for label, baseline in baselines.BASELINES.items():
        opened = open_source(name)
        baseline.apply(opened.model, layers)
        error = drift.teacher_forced(truth, opened.model)
        bits = sum(
            baseline.bits(opened.model.get_submodule(n))
            * float_model.model.get_submodule(n).weight.numel()
            for n in layers
        )
        weights = sum(float_model.model.get_submodule(n).weight.numel() for n in layers)
        rows.append(
            {
                "model": name,
                "row": label,
                "error": sum(error) / len(error),
                "bits": bits / weights,
                "psnr": None,
                "promoted": 0,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(".results/results.json"))
    options = parser.parse_args()
    rows = [
        row
        for name in ("demo", "demo-hard")
        for row in measure(name, options.samples, options.calibration)
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    conditions = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **vars(options),
        "out": None,
    }
    options.out.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1))
    print("| row | demo: error | demo-hard: error | bits | PSNR demo | PSNR hard |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in (r for r in rows if r["model"] == "demo"):
        hard = next(r for r in rows if r["model"] == "demo-hard" and r["row"] == row["row"])
        cells = (
            f"{row['error']:.2e}",
            f"{hard['error']:.2e}",
            f"{row['bits']:.2f}",
            *("" if r["psnr"] is None else f"{r['psnr']:.1f}" for r in (row, hard)),
        )
        print("| " + " | ".join((row["row"], *cells)) + " |")


if __name__ == "__main__":
    main()
