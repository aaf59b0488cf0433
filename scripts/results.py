# SPDX-License-Identifier: Apache-2.0
"""Measure the tables of docs/results.md: ``make results``.

Every row of a table uses the same recorded inputs of the float model and the same statistics. A row
is measured in a separate process, whose peak memory counts, and saved as a JSON file. When the
command is repeated, it measures only the missing rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dtq.api import open_runs, run_stages
from dtq.calibrate import store
from dtq.evaluate import baselines, trajectory
from dtq.evaluate.evaluate import compare_images, result_row
from dtq.evaluate.metrics import extractors, fid
from dtq.io.package_data import yaml_names
from dtq.pipelines import prompts
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.settings import SamplingSettings
from dtq.recipe import Recipe
from dtq.stages.calibrate import collect
from dtq.stages.plan import plan

EVERYTHING = frozenset({"channels", "hessian", "sample"})
MODELS = ("demo", "demo-outliers")
OURS = ("w8a8", "w4a8", "w4a8-hq", "w4a16", "w4a4", "w3a8", "nvfp4", "mxfp4", "w2-vq")
NAIVE = "rtn-w4a8"
BUDGETS: dict[str, tuple[str, dict]] = {
    f"w4a8 --budget {bits}": (
        "w4a8",
        {"allocate": {"budget": bits, "formats": options}, "promote": {"to": ""}},
    )
    for bits, options in (
        (4.1, ["int4-2l-g64", "int3-2l-g64"]),
        (4.8, ["int4-2l-g64", "int8-row"]),
    )
}
# as few bits as the methods of the papers at 2 bits: scales per output channel need many bits if K is small
TWO_BITS = "w2-vq, no row scales"
# label: (recipe, top-level keys that differ)
VARIANTS: dict[str, tuple[str, dict]] = {
    **BUDGETS,
    TWO_BITS: ("w2-vq", {"weights": "vq-256x4"}),
    "w4a8, no transform": ("w4a8", {"transform": "none", "transform_candidates": []}),
    "w4a8, smoothing 0.5 alone": ("w4a8", {"transform": "smooth", "transform_candidates": []}),
    "w4a8, rotation alone": ("w4a8", {"transform": "hadamard", "transform_candidates": []}),
    "w4a8, search alone": ("w4a8", {"transform_candidates": []}),
    # other random signs of the rotation; the two rows above have seed 0
    **{
        f"w4a8, {label}, seed {seed}": (
            "w4a8",
            {"transform": {name: {"seed": seed}}, "transform_candidates": []},
        )
        for label, name, last in (("search", "search", 2), ("rotation alone", "hadamard", 3))
        for seed in range(1, last + 1)
    },
    "w4a8, clip search instead of GPTQ": ("w4a8", {"solver": "search"}),
    "w4a8, modulation w4a16": ("w4a8", {"modulation": "w4a16"}),
    "w4a8, activations int8-static-timestep": ("w4a8", {"activations": "int8-static-timestep"}),
    "ditas over the first step": ("ditas", {"transform": {"ditas": {"reduce": "first"}}}),
    "ditas over the mean": ("ditas", {"transform": {"ditas": {"reduce": "mean"}}}),
    "ditas, no branch": ("ditas", {"lowrank": "none"}),
    "lrq-dit, uniform 4 bits": ("lrq-dit", {"weights": "int4-row", "solver": "search"}),
    "lrq-dit, 3 bits": ("lrq-dit", {"weights": "twinlog3-row"}),
    "lrq-dit, uniform 3 bits": ("lrq-dit", {"weights": "int3-row", "solver": "search"}),
    "vq4dit, plain k-means": ("vq4dit", {"finetune": "none"}),
    "hq-dit, E2M1 everywhere": ("hq-dit", {"format_candidates": []}),
    "hq-dit, rounding": ("hq-dit", {"solver": "search"}),
    "viditq-mp, not decoupled": (
        "viditq-mp",
        {
            "allocate": {
                "budget": 5.6,
                "formats": ["int4-asym-row", "int8-row"],
                "per_group_metric": False,
            }
        },
    ),
    "w4a4, half of the steps int8": (
        "w4a4",
        {"step_policy": {"precisions": ["native", "a8"], "budget": 0.5}},
    ),
}


# labels of claims, which are checked on one model only
DEMO_ONLY = {
    label
    for label, (base, _) in VARIANTS.items()
    if base not in ("w4a8", "w2-vq") or ", seed " in label
}


def rows() -> list[str]:
    """Labels of all rows."""
    return [*yaml_names("recipes"), *VARIANTS, *baselines.BASELINES]


def prepare(name: str, folder: Path, samples: int, calibration: int) -> None:
    """Record inputs, outputs, images and statistics of the float model, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "truth.pt").exists():
        return
    settings = _settings(samples)
    loaded = load_transformer(name)
    requests = prompts.load("auto", loaded.pipeline, settings.samples)
    truth = trajectory.record(loaded.pipeline, loaded.model, requests, settings)
    recipe = Recipe.load("w4a8", calibration={"samples": calibration})
    (run,) = open_runs([loaded], recipe)
    plan(run)
    store.save(collect(run, EVERYTHING), folder / "stats.safetensors")
    torch.save(truth, folder / "truth.pt")


def measure(name: str, row: str, folder: Path, samples: int) -> dict:
    """Measure one row. The models are small, so its memory is mostly that of the quantization."""
    truth: trajectory.Trajectory = torch.load(folder / "truth.pt", weights_only=False)
    loaded = load_transformer(name)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before = _memory("VmRSS")
    started = time.monotonic()
    if row in baselines.BASELINES:
        (run,) = open_runs([loaded], Recipe.load("w4a8"))
        plan(run)
        layers = [x.name for x in run.plan.gemm()]
        weights = {n: loaded.model.get_submodule(n).weight.numel() for n in layers}
        baseline = baselines.BASELINES[row]
        baseline.apply(loaded.model, layers)
        bits = sum(baseline.bits(loaded.model.get_submodule(n)) * k for n, k in weights.items())
        result = {"bits": bits / sum(weights.values()), "promoted": 0}
    else:
        base, changes = VARIANTS.get(row, (row, {}))
        recipe = Recipe.load(base, **changes)
        stats = store.load(folder / "stats.safetensors")
        runs = open_runs([loaded], recipe, statistics=stats, progress=False)
        (report,) = run_stages(runs).values()
        quantized = report.plan
        result = {
            "bits": quantized.bits(quantized.gemm()),
            "bits_all": quantized.bits(quantized.quantized()),
            "promoted": sum(x.promoted for x in report.layers),
            "formats": Counter(x.weight_format for x in quantized.gemm()),
            "steps": report.step_policy,
        }
    result["seconds"] = time.monotonic() - started
    result["memory"] = _memory("VmHWM") - before
    measured = result_row(row, trajectory.teacher_forced(truth, loaded.model))
    result |= {"model": name, "row": row, "error": measured.error, "by_step": measured.error_steps}
    if row in (*yaml_names("recipes"), *baselines.BASELINES):
        settings = _settings(samples)
        requests = prompts.load("auto", loaded.pipeline, settings.samples)
        quantized_run = trajectory.record(loaded.pipeline, loaded.model, requests, settings)
        compare_images(measured, torch.cat(truth.images), torch.cat(quantized_run.images))
        extractor = extractors.load("emoji")
        got, want = (extractor(torch.cat(t.images))["pool"] for t in (quantized_run, truth))
        result |= {"psnr": measured.psnr, "fid": fid.frechet(got, want)}
    return result


def _settings(samples: int) -> SamplingSettings:
    return SamplingSettings(samples=samples, steps=20, batch_size=8, seed=1000)


def _memory(field: str) -> int:
    """Bytes of this process: VmRSS, the resident memory now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) * 1024


def table(results: dict[str, dict[str, dict]], labels: list[str]) -> list[str]:
    """Lines of a table, with a row for every label that was measured on ``demo``."""
    head = "| row | bits | demo: error | demo-outliers: error | PSNR | PSNR, demo-outliers | FID | time | memory |"
    lines = [head, "| --- |" + " ---: |" * 8]
    for label in labels:
        demo, outliers = (results[m].get(label) for m in MODELS)
        if demo is None:
            continue
        cells = [f"{demo['bits']:.2f}", f"{demo['error']:.2e}"]
        cells.append(f"{outliers['error']:.2e}" if outliers else "")
        cells += [f"{r['psnr']:.1f}" if r and r.get("psnr") else "" for r in (demo, outliers)]
        cells.append(f"{demo['fid']:.2f}" if "fid" in demo else "")
        cells += [f"{demo['seconds']:.0f} s", f"{max(0, demo['memory']) / 1e6:.0f} MB"]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def claims(results: dict[str, dict]) -> list[str]:
    """Lines of a table of claims of the papers, and the errors on ``demo`` that test them."""
    pairs = {
        "smoothing over all timesteps beats one step (DiTAS)": ("ditas", "ditas over the first step"),
        "the maximum over time beats the mean (DiTAS)": ("ditas", "ditas over the mean"),
        "the low-rank compensation helps (DiTAS)": ("ditas", "ditas, no branch"),
        "twin-log beats uniform at 4 bits (LRQ-DiT)": ("lrq-dit", "lrq-dit, uniform 4 bits"),
        "twin-log beats uniform at 3 bits (LRQ-DiT)": ("lrq-dit, 3 bits", "lrq-dit, uniform 3 bits"),
        "calibrated assignments beat k-means (VQ4DiT)": ("vq4dit", "vq4dit, plain k-means"),
        "choosing the format by layer beats E2M1 (HQ-DiT)": ("hq-dit", "hq-dit, E2M1 everywhere"),
        "GPTQ on the FP grid helps (HQ-DiT)": ("hq-dit", "hq-dit, rounding"),
        "decoupled metrics beat one metric (ViDiT-Q-MP)": ("viditq-mp", "viditq-mp, not decoupled"),
    }  # fmt: skip
    lines = [
        "| claim | with | without | ratio | holds here |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for claim, (a, b) in pairs.items():
        if a in results and b in results:
            x, y = results[a]["error"], results[b]["error"]
            lines.append(f"| {claim} | {x:.2e} | {y:.2e} | {x / y:.2g} | {_holds(x / y)} |")
    for label in ("rtn-w4a8", "w4a8", "w4a4"):
        if label in results:
            steps = results[label]["by_step"]
            k = len(steps) // 4
            x, y = sum(steps[:k]) / k, sum(steps[-k:]) / k
            claim = (
                f"the error of the first quarter of the steps is higher than that of the last "
                f"({label})"
            )
            # this claim holds if the first number is larger
            lines.append(f"| {claim} | {x:.2e} | {y:.2e} | {x / y:.2g} | {_holds(y / x)} |")
    if "hq-dit" in results:
        formats = ", ".join(f"{n} x {f}" for f, n in results["hq-dit"]["formats"].items())
        lines.append(f"| HQ-DiT chooses E2M1 for most layers: {formats} | | | | |")
    return lines


def _holds(ratio: float) -> str:
    """Whether the first error is lower; other random signs of the rotation also change it by 5 %."""
    return "no difference" if 0.95 <= ratio <= 1.05 else "yes" if ratio < 1 else "no"


def own_recipes() -> list[str]:
    """Recipes of dtq, in the order of the tables."""
    return sorted((r for r in yaml_names("recipes") if r in OURS), key=OURS.index)


def paper_recipes() -> list[str]:
    """Recipes of the methods of the papers."""
    return [r for r in yaml_names("recipes") if r not in (*OURS, NAIVE)]


def plot(results: dict[str, dict[str, dict]], path: Path) -> None:
    """Plot error against bits, for dtq, the methods of the papers and other libraries."""
    from adjustText import adjust_text
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 12), layout="constrained")
    for axis, model in zip(figure.subplots(2, 1), MODELS, strict=True):
        texts = []
        kinds = (
            ("dtq", [*OURS, *BUDGETS, TWO_BITS], "o", "#1668b8"),
            ("methods of the papers", paper_recipes(), "s", "#c2571a"),
            ("other libraries, rounding", [*baselines.BASELINES, NAIVE], "^", "#5b7f2b"),
        )
        for label, group, marker, color in kinds:
            points = [results[model][r] for r in group if r in results[model]]
            axis.scatter(
                [p["bits"] for p in points], [p["error"] for p in points], label=label,
                marker=marker, color=color, zorder=3,
            )  # fmt: skip
            texts += [axis.text(p["bits"], p["error"], p["row"], fontsize=8) for p in points]
        axis.set(
            yscale="log", title=model, xlabel="bits per weight, all metadata",
            ylabel="teacher-forced error",
        )  # fmt: skip
        axis.grid(alpha=0.3)
        axis.margins(0.08)
        adjust_text(texts, ax=axis, arrowprops={"arrowstyle": "-", "color": "#999", "lw": 0.6})
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16, help="images for evaluation")
    parser.add_argument("--calibration", type=int, default=64, help="images for calibration")
    parser.add_argument("--out", type=Path, default=Path(".results"), help="folder for results")
    parser.add_argument("--jobs", type=int, default=2, help="rows measured in parallel")
    parser.add_argument("--only", nargs="*", help="labels of the rows to measure")
    parser.add_argument("--row", nargs=2, metavar=("MODEL", "ROW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        name, row = options.row
        result = measure(name, row, options.out / name, options.samples)
        result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        _file(options.out, name, row).write_text(json.dumps(result, indent=1))
        return
    for name in MODELS:
        prepare(name, options.out / name, options.samples, options.calibration)
    jobs = [(m, r) for r in options.only or rows() for m in MODELS]
    jobs = [(m, r) for m, r in jobs if m == "demo" or r not in DEMO_ONLY]
    missing = [(m, r) for m, r in jobs if not _file(options.out, m, r).exists()]

    def one(job: tuple[str, str]) -> None:
        command = [sys.executable, __file__, "--out", str(options.out)]
        command += ["--samples", str(options.samples), "--row", *job]
        done = subprocess.run(command, capture_output=True, text=True)
        state = "done" if done.returncode == 0 else f"FAILED: {done.stderr.strip()[-400:]}"
        print(f"{job[0]}: {job[1]}: {state}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, missing))
    results: dict[str, dict[str, dict]] = {m: {} for m in MODELS}
    for name in MODELS:
        for row in rows():
            if _file(options.out, name, row).exists():
                results[name][row] = json.loads(_file(options.out, name, row).read_text())
    ours, papers = own_recipes(), paper_recipes()
    sections = {
        "Recipes of dtq": ours,
        "Methods of the papers": papers,
        "Other libraries, and plain rounding": [*baselines.BASELINES, NAIVE],
        "Budgets": list(BUDGETS),
        "Variants": [v for v in VARIANTS if v not in BUDGETS],
    }
    for title, labels in sections.items():
        print(f"\n### {title}\n")
        print("\n".join(table(results, labels)))
    print("\n### Claims of the papers\n")
    print("\n".join(claims(results["demo"])))
    plot(results, options.out / "frontier.png")


def _file(out: Path, model: str, row: str) -> Path:
    return out / model / f"{row.replace(' ', '_').replace(',', '')}.json"


if __name__ == "__main__":
    main()
