# SPDX-License-Identifier: Apache-2.0
"""``dtq export``: a quantized model as a file of another engine."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtq.cli import options as opt
from dtq.cli.output import size, table
from dtq.errors import InputError

if TYPE_CHECKING:
    from dtq.engines.export import ExportReport


# fmt: off
_options = opt.combined(
    click.option("--to", metavar="TARGET", help="Engine and format; --list shows them. Default: none."),
    opt.output(help="File to write. Default: none; it is needed without --list."),
    opt.component,
    opt.variant,
    click.option("--unsupported", type=click.Choice(["refuse", "float"]), default="refuse",
                 help="Layers that the engine cannot hold: refuse the model with every reason, or "
                      "store them as floats in the compute dtype."),
    click.option("--names", type=click.Choice(["auto", "original", "diffusers"]), default="auto",
                 help="Names of the tensors: those of the model's original files, by which ComfyUI and "
                      "stable-diffusion.cpp know it, with q, k and v in one tensor where they are; those "
                      "of diffusers; or original ones where dtq has a table of them."),
    opt.flag("--overwrite", help="Replace an existing file."),
    opt.flag("--list", "show", help="List the targets, what each can hold, and what it loses against dtq's own "
                                   "formats, with the measured error."),
    opt.json(help="Print what was written as JSON."),
)
# fmt: on


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@_options
def export(
    checkpoint: Path | None,
    to: str | None,
    output: Path | None,
    components: tuple[str, ...],
    variant: str | None,
    unsupported: str,
    names: str,
    overwrite: bool,
    show: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT as a file of another engine.

    CHECKPOINT is the output of dtq quantize. The integers and scales are those of the checkpoint;
    nothing is rounded again. An engine holds less than dtq does: smoothing, low-rank branches, step
    policies and static scales have no place in most files; --list shows what each lacks, and the
    error that this costs. docs/engines has a page for each target, with how to load the file. Layers
    that are one tensor in the original files must have the same format, and are refused otherwise.
    dtq quantize --to TARGET checks a recipe before it runs.

    \b
    dtq quantize demo --recipe convrot-w8a8 --to comfy-int8 -o demo-int8
    dtq export demo-int8 --to comfy-int8 -o demo-int8.safetensors
    """
    if show:
        _list(as_json)
        return
    from dtq.engines.export import export as write

    if checkpoint is None or to is None or output is None:
        raise InputError("give CHECKPOINT, --to TARGET and -o FILE; --list shows the targets")
    report = write(
        checkpoint,
        to,
        output,
        component=components or "auto",
        variant=variant,
        unsupported=unsupported,
        names=names,
        overwrite=overwrite,
    )
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        print_export(report)


def print_export(report: ExportReport) -> None:
    """Print what was written.

    Args:
        report: of the export.
    """
    counts = Counter(report.layers.values())
    text = ", ".join(f"{count} in {name}" for name, count in counts.most_common())
    click.echo(f"{report.file}: {size(report.nbytes)}, {len(report.layers)} linears ({text})")
    if report.as_float:
        rows = list(report.as_float.items())
        table(("stored as floats", "because"), rows)
    click.echo(f"names:      {report.names}")
    click.echo(f"load it:    docs/engines/{report.target}.md")


def _list(as_json: bool) -> None:
    from dtq.engines import TARGETS

    if as_json:
        data = {
            name: {"about": each.about, "formats": dict(each.limits.formats),
                   "transforms": each.limits.transforms, "recipe": each.limits.recipe,
                   "loss": asdict(each.loss)}
            for name, each in TARGETS.items()
        }  # fmt: skip
        click.echo(json.dumps(data))
        return
    rows = [
        (name, target.limits.recipe, ", ".join(target.limits.formats), target.about)
        for name, target in TARGETS.items()
    ]
    table(("target", "recipe", "weights", "about"), rows)
    losses = []
    for name, target in TARGETS.items():
        loss = target.loss
        ratios = [x and f"{x:.2f} x {loss.own}" for x in (loss.demo, loss.outliers)]
        losses.append((name, loss.lacks, *(x or "not measured" for x in ratios)))
    click.echo("\nSquared error of each recipe, relative to a recipe of dtq's own formats (conditions: "
               "docs/engines/README.md):")  # fmt: skip
    table(("target", "lacks", "demo", "demo-outliers"), losses)
