# SPDX-License-Identifier: Apache-2.0
"""What the command line prints: tables, sizes, durations."""

from __future__ import annotations

import math
import re
import statistics as numbers
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dtq.bench.cases import RECIPES
from dtq.bench.compare import BenchRow, Result, geometric_means, verdict
from dtq.estimate.size import Estimate
from dtq.kernels import explain
from dtq.models import Scan
from dtq.nn import QuantLinear
from dtq.pipelines.loading import load_model
from dtq.plan.layers import Plan
from dtq.recipe.resolve import Recipe
from dtq.stages.report import Report


def plan_json(plan: Plan, cost: Estimate, scan: Scan) -> dict[str, Any]:
    """What ``dtq plan --json`` prints of one transformer."""
    return {
        **plan.to_json(),
        "family": scan.family,
        "traced": scan.traced,
        "unmatched": scan.unsupported,
        "bytes": cost.file,
        "bytes_most": cost.file_most,
        "memory": cost.memory,
        "disk": cost.disk,
        "seconds": cost.seconds,
        "bits_gemm": plan.bits(plan.gemm()),
        "bits_adaln": plan.bits([x for x in plan.quantized() if x.role == "adaln"]),
    }


def inspected(folder: Path) -> dict[str, Any]:
    """What is in the folder of a quantized model, and which kernel would run each layer."""
    model = load_model(folder)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    rows = [
        {
            "name": name,
            "shape": [m.out_features, m.in_features],
            "weight_format": m.weight_format,
            "activation_format": m.activation_format,
            "hadamard": m.problem.hadamard_block,
            "bits": 8
            * sum(s.nbytes for s in m.tensor_specs().values())
            / (m.in_features * m.out_features),
            "kernel": m.kernel.name,
            "kernels": explain(m.problem, (m.out_features, m.in_features)),
        }
        for name, m in layers
    ]
    config = model.config["quantization_config"]
    stored = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return {"recipe": config.recipe, "bytes": stored, "layers": rows}


def print_inspected(folder: str, data: dict[str, Any], kernels: bool) -> None:
    rows = data["layers"]
    click.echo(
        f"{folder}: recipe {data['recipe']}, {len(rows)} quantized linears, {size(data['bytes'])}, checksums good"
    )
    table(
        ("layer", "N x K", "weights", "activations", "bits", "kernel"),
        [
            (
                r["name"],
                "x".join(map(str, r["shape"])),
                r["weight_format"],
                r["activation_format"],
                f"{r['bits']:.2f}",
                r["kernel"],
            )
            for r in rows
        ],
    )
    if kernels:
        print_kernels(rows)


def print_kernels(rows: Sequence[dict[str, Any]]) -> None:
    """What runs each layer on each device, and every refusal; layers with the same answer once."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        alike.setdefault(tuple(row["kernels"]), []).append(row["name"])
    for lines, names in alike.items():
        click.echo(f"\n{', '.join(_each_once(dict.fromkeys(names, '')))}")
        for line in lines:
            click.echo(f"  {line}")


def print_plan(plan: Plan, cost: Estimate, scan: Scan, chosen: Recipe) -> None:
    rows = []
    for x in plan.layers:
        how = "unquantized" if x.unquantized else f"{x.transform.name}, {x.solver.name}"
        bits = "" if x.unquantized else f"{x.bits(plan.bins):.2f}"
        rows.append(
            (
                x.name,
                x.role,
                "x".join(map(str, x.shape)),
                x.weight_format or "-",
                x.activation_format if not x.unquantized else "-",
                bits,
                how,
                x.note,
            )
        )
    table(("layer", "role", "N x K", "weights", "activations", "bits", "method", "note"), rows)
    modulation = [x for x in plan.quantized() if x.role == "adaln"]
    click.echo()
    if not scan.traced:
        click.echo(
            "no inputs could be made up for this class: layers were sorted by name, not by a traced forward"
        )
    other = [x.name for x in plan.layers if x.role == "other"]
    if other:
        click.echo(
            f"{len(other)} linears that no rule knows: {', '.join(other[:6])}{' ...' if len(other) > 6 else ''}"
        )
    for name, what in _each_once(scan.unsupported).items():
        click.echo(f"kept, {what}: {name}")
    click.echo(f"attention and feed-forward  {plan.bits(plan.gemm()):.3f} bits per weight")
    if modulation:
        click.echo(f"modulation                  {plan.bits(modulation):.3f} bits per weight")
    click.echo(
        f"file                        {cost.file} bytes ({size(cost.file)}); float {size(cost.float_file)}"
    )
    if cost.file_most > cost.file:
        click.echo(
            f"  at most                   {size(cost.file_most)} if the whole budget is spent ({chosen.allocate.budget or chosen.promote.budget})"
        )
    click.echo(f"peak memory                 about {size(cost.memory)}")
    click.echo(f"disk while it runs          about {size(cost.disk)}")
    click.echo(
        f"time                        {'unknown' if cost.seconds is None else f'about {duration(cost.seconds)} on this machine'}"
    )


def print_result(report: Report, output: Path, seconds: float) -> None:
    plan = report.plan
    watched = {x["layer"] for x in report.sanity_check.get("promoted", [])}
    promoted = [x for x in report.layers if x.promoted and x.name not in watched]
    worst = sorted(
        (x for x in report.layers if x.error is not None), key=lambda x: -(x.error or 0)
    )[:5]
    click.echo(
        f"{output}: {len(plan.quantized())} linears, {plan.bits(plan.gemm()):.2f} bits per attention and feed-forward weight, {duration(seconds)}"
    )
    if worst:
        table(
            ("worst layers", "weights", "output error", "transform"),
            [(x.name, x.weight_format, f"{x.error:.1e}", x.transform) for x in worst],
        )
    other = [x.name for x in plan.layers if x.role == "other"]
    if other:
        click.echo(
            f"{len(other)} linears that no rule knows: {', '.join(other[:6])}{' ...' if len(other) > 6 else ''}"
        )
    if report.allocation:
        chosen = Counter(row["option"] for row in report.allocation["rows"])
        spent, allowed = report.allocation["bytes"], report.allocation["budget"]
        inputs = ", ".join(f"{n} inputs in {option}" for option, n in chosen.most_common())
        click.echo(f"budget: {size(spent)} of {size(allowed)} spent; {inputs}")
    blocks = report.finetune.get("blocks", [])
    if blocks:
        better = [b for b in blocks if b["accepted"] and b["before"] and b["after"]]
        gain = numbers.median(b["after"] / b["before"] for b in better) if better else 1.0
        click.echo(
            f"fine-tuned {len(better)} of {len(blocks)} blocks, median block error x {gain:.2f}"
        )
    if report.step_policy:
        counts = zip(report.step_policy["modes"], report.step_policy["counts"], strict=True)
        said = ", then ".join(f"{mode} for {n}" for mode, n in reversed(list(counts)))
        click.echo(f"step policy over {report.step_policy['num_inference_steps']} steps: {said}")
    for x in promoted:
        click.echo(
            f"promoted {x.name} to {x.weight_format}: error {x.error_before:.1e} -> {x.error:.1e}"
        )
    for x in report.sanity_check.get("promoted", []):
        click.echo(f"sanity check: promoted {x['layer']} to {x['to']}: {x['why']}")
    click.echo(f"load it:    import dtq; DiffusionPipeline.from_pretrained({str(output)!r})")


def print_race(rows: Sequence[BenchRow]) -> None:
    """One size, as soon as it is measured."""
    shares = any(row.share is not None for row in rows)
    table(
        (
            f"{rows[0].case}, M {rows[0].tokens}",
            "ms",
            "weights",
            *(["of peak"] if shares else []),
            *(f"/ {ours}" for ours in RECIPES),
        ),
        [
            (
                row.name,
                f"{row.seconds * 1e3:.3f}",
                size(row.bytes),
                *([or_dash(row.share, ".0%")] if shares else []),
                *(
                    "{1:.2f} ({0:.2f}-{2:.2f})".format(*row.ratio[ours])
                    if ours in row.ratio
                    else "1"
                    for ours in RECIPES
                ),
            )
            for row in rows
        ],
    )
    click.echo()


def print_bench(result: Result) -> None:
    """Geometric means over the cases, the conditions, a sentence."""
    for ours in RECIPES:
        means = geometric_means(result.rows, ours)
        tokens, others = sorted({t for t, _ in means}), list(dict.fromkeys(n for _, n in means))
        table(
            (f"time / {ours}", *(f"M {t}" for t in tokens)),
            [(name, *(or_dash(means.get((t, name)), ".2f") for t in tokens)) for name in others],
        )
        click.echo()
    click.echo(", ".join(f"{key} {value}" for key, value in result.conditions.items()))
    click.echo(verdict(result.rows))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    lines = [tuple(map(str, row)) for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for i, line in enumerate(lines):
        click.echo("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
        if i == 0:
            click.echo("  ".join("-" * w for w in widths))


def or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _each_once(names: dict[str, str]) -> dict[str, str]:
    """The same in every block is said once."""
    return {re.sub(r"\.\d+\.", ".*.", name): what for name, what in names.items()}
