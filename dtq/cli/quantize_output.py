# SPDX-License-Identifier: Apache-2.0
"""What ``dtq quantize`` prints when it has written the folder."""

from __future__ import annotations

import math
import statistics as numbers
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtq.cli.output import duration, number_of_tables, or_dash, print_unknown, size, table

if TYPE_CHECKING:
    from dtq.pipelines.loading import LoadedModel
    from dtq.stages.report import Report


def print_result(
    loaded: LoadedModel,
    reports: dict[str, Report],
    data: dict[str, Any],
    output: Path,
    seconds: float,
    target: str,
) -> None:
    """Print what was decided, measured and written.

    Args:
        loaded: the first model, with its pipeline.
        reports: of the models that dtq could quantize, by component.
        data: of ``dtq_report.json``.
        output: the folder that was written.
        seconds: run time.
        target: key of ``TARGETS`` whose file was written too, or empty.
    """
    for name, report in reports.items():
        _print_model(name or type(loaded.model).__name__, report)
        for layer in report.plan.tables():  # the whole pipeline has one dtype
            sizes = (
                f"{size(math.prod(layer.shape) * loaded.dtype.itemsize)} to {size(layer.nbytes())}"
            )
            click.echo(f"table of embeddings {layer.name} in {layer.weight_format}: {sizes}")
    if decodes := data.get("vae", {}):
        psnr = "equal decodes" if decodes["psnr"] is None else f"PSNR {decodes['psnr']:.1f} dB"
        sizes = f"{size(decodes['bytes_before'])} to {size(decodes['bytes'])}"
        click.echo(f"vae: {decodes['layers']} layers in {decodes['format']}, {sizes}, {psnr}")
    for name, done in data.get("bitsandbytes", {}).items():
        sizes = f"{size(done['bytes_before'])} to {size(done['bytes'])}"
        click.echo(f"{name}: {done['layers']} linears in NF4 of bitsandbytes, {sizes}")
    if len(files := data.get("pipeline", {}).get("components", {})) > 1:
        _print_components(data["pipeline"], files)
    for file in data.get("exported", []):
        click.echo(f"for {target}: {output / file}, see docs/engines/{target}.md")
    click.echo(f"{output}: written in {duration(seconds)}")
    kind = type(loaded.model).__name__ if loaded.pipeline is None else "DiffusionPipeline"
    click.echo(f"load it:    import dtq; {kind}.from_pretrained({str(output)!r})")


def _print_components(pipeline: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Bytes of every component, and its share of the error where a budget has measured it."""
    total, budget = pipeline["bytes"], pipeline.get("budget")
    rows = [
        (name, size(c["bytes"]), f"{c['bytes'] / total:.0%}", or_dash(c["error_share"], ".0%"))
        for name, c in files.items()
    ]
    allowed = f" of {size(budget)}" if budget else ""
    table(("component", "file", "share", "share of the error"),
          [*rows, ("together", f"{size(total)}{allowed}", "", "")])  # fmt: skip


def _print_model(name: str, report: Report) -> None:
    """Print what was decided and measured for one model.

    Args:
        name: of its component, or its class.
        report: of the model.
    """
    plan = report.plan
    quantized = plan.quantized()
    if report.allocation and not quantized:
        click.echo(f"{name}: stays float, for which the budget has room")
        return
    bits = f"{plan.bits(plan.gemm()):.2f} bits per attention and feed-forward weight among them"
    convolutions, tables = len(plan.convolutions()), len(plan.tables())
    others = convolutions + tables
    linears = f"{len(quantized) - others} of {len(plan.layers) - others} linears"
    more = f" and {convolutions} convolutions" if convolutions else ""
    more += f" and {number_of_tables(tables)}" if tables else ""
    click.echo(f"{name}: {linears}{more} quantized, {bits}")
    layers = [x for x in report.layers if x.error is not None]
    if worst := sorted(layers, key=lambda x: -(x.error or 0))[:5]:
        rows = [(x.name, x.weight_format, f"{x.error:.1e}", x.transform) for x in worst]
        table(("worst layers", "weights", "output error", "transform"), rows)
    print_unknown(plan)
    if report.allocation:
        counts = Counter(row["option"] for row in report.allocation["rows"])
        spent, allowed = size(report.allocation["bytes"]), report.allocation.get("budget")
        inputs = ", ".join(f"{n} in {option}" for option, n in counts.most_common())
        of = f" of {size(allowed)}" if allowed else ""  # that of a pipeline is no model's alone
        click.echo(
            f"budget: {spent}{of} spent on attention and feed-forward weights; input groups: {inputs}"
        )
    if blocks := report.finetune.get("blocks", []):
        better = [b for b in blocks if b["accepted"] and b["before"] and b["after"]]
        gain = numbers.median(b["after"] / b["before"] for b in better) if better else 1.0
        count = f"{len(better)} of {len(blocks)} blocks"
        click.echo(f"fine-tuned {count}, median block error x {gain:.2f}")
    if policy := report.step_policy:
        modes = list(zip(policy["modes"], policy["counts"], strict=True))
        text = ", then ".join(f"{mode} for {n}" for mode, n in reversed(modes))
        click.echo(f"step policy over {policy['num_inference_steps']} steps: {text}")
    if chosen := report.attention:
        ratio = chosen["error"] / chosen["error_float"] if chosen["error_float"] else 1.0
        count = f"{len(chosen['int8'])} of {len(chosen['int8']) + len(chosen['float'])} modules"
        click.echo(f"int8 attention in {count}: error of a step x {ratio:.3f}")
    checked = report.sanity_check.get("promoted", [])
    for x in report.layers:
        if x.promoted and x.name not in {row["layer"] for row in checked}:
            change = f"error {x.error_before:.1e} -> {x.error:.1e}"
            click.echo(f"promoted {x.name} to {x.weight_format}: {change}")
    for row in checked:
        click.echo(f"sanity check: promoted {row['layer']} to {row['to']}: {row['why']}")
