# SPDX-License-Identifier: Apache-2.0
"""``dtq inspect``: what is in a quantized folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dtq.cli import options as opt
from dtq.cli.output import fold, number_of_tables, size, table
from dtq.errors import InputError

CONVOLUTION = "float convolution of the unpacked weight"
"""In place of a kernel."""
TABLE = "float rows of the unpacked table"
"""In place of a kernel."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@opt.component
@opt.variant
@opt.flag("--kernels", help="Show which kernel runs each layer, and why the others do not.")
@opt.every_layer
@opt.json(help="Print the layers as JSON.")
def inspect(
    folder: Path,
    components: tuple[str, ...],
    variant: str | None,
    kernels: bool,
    every: bool,
    as_json: bool,
) -> None:
    """Check FOLDER and show its quantized layers.

    FOLDER is the output of dtq quantize. Its checksums are verified.

    \b
    dtq inspect demo-w4a8 --kernels
    """
    from dtq.checkpoint import reader

    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    found = reader.verify(folder, components or "auto", variant, warn=True)
    data = {name: _inspect(path, own) for name, (path, own) in found.items()}
    if as_json:
        click.echo(json.dumps(data if len(data) > 1 else next(iter(data.values()))))
        return
    for name, model in data.items():
        _print(f"{folder}/{name}" if len(data) > 1 else str(folder), model, every)
        if kernels:
            _print_kernels(model["layers"])


def _inspect(folder: Path, variant: str | None) -> dict[str, Any]:
    """The layers of a quantized model as plain data, and which kernel would run each."""
    from dtq.kernels import explain
    from dtq.models.linears import matrix_shape, shape_of
    from dtq.nn import QuantLinear
    from dtq.nn.conv import QuantConv
    from dtq.nn.embedding import QuantEmbedding, tied_to_tables
    from dtq.pipelines.loading import load_model
    from dtq.pipelines.weight_files import weight_files

    model = load_model(folder, variant=variant)
    rows: list[dict[str, Any]] = []
    twins = tied_to_tables(model)
    for name, m in model.named_modules():
        if name in twins:  # it has no tensors of its own
            continue
        if isinstance(m, QuantLinear):
            shape, kernel = shape_of(m), m.kernel.name
            kernels, hadamard = explain(m.problem, shape), m.problem.hadamard_block
        elif isinstance(m, QuantConv):
            shape, kernel, kernels, hadamard = matrix_shape(m), CONVOLUTION, [CONVOLUTION], 1
        elif isinstance(m, QuantEmbedding):
            shape, kernel, kernels, hadamard = matrix_shape(m), TABLE, [TABLE], 1
        else:
            continue
        rows.append(
            {
                "name": name,
                "shape": [*shape],
                "weight_format": m.weight_format,
                "activation_format": m.activation_format,
                "hadamard": hadamard,
                "bits": 8
                * sum(spec.nbytes for spec in m.tensor_specs().values())
                / math.prod(shape),
                "kernel": kernel,
                "kernels": kernels,
            }
        )
    config = model.config.quantization_config
    stored = sum(f.stat().st_size for f in weight_files(folder, variant))
    return {"recipe": config.recipe, "bytes": stored, "layers": rows}


def _print(folder: str, data: dict[str, Any], every: bool) -> None:
    convolutions = sum(row["kernel"] == CONVOLUTION for row in data["layers"])
    tables = sum(row["kernel"] == TABLE for row in data["layers"])
    more = f" and {convolutions} convolutions" if convolutions else ""
    more += f" and {number_of_tables(tables)}" if tables else ""
    click.echo(
        f"{folder}: recipe {data['recipe']}, "
        f"{len(data['layers']) - convolutions - tables} quantized linears{more}, "
        f"{size(data['bytes'])}, checksums good"
    )
    rows = [
        (
            row["name"],
            "x".join(map(str, row["shape"])),
            row["weight_format"],
            row["activation_format"],
            f"{row['bits']:.2f}",
            row["kernel"],
        )
        for row in data["layers"]
    ]
    head = ("layer", "N x K", "weights", "activations", "bits", "kernel")
    table(head, rows if every else fold(rows))


def _print_kernels(rows: Sequence[dict[str, Any]]) -> None:
    """What runs each layer on each device, with reasons; layers with the same answer once."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        groups.setdefault(tuple(row["kernels"]), []).append((row["name"],))
    for lines, names in groups.items():
        click.echo("\n" + ", ".join(name for (name,) in fold(names)))
        for line in lines:
            click.echo(f"  {line}")
