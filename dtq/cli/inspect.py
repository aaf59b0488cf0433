# SPDX-License-Identifier: Apache-2.0
"""``dtq inspect``: what is in a quantized folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dtq.checkpoint import reader
from dtq.cli.options import component_option
from dtq.cli.output import inspected, print_inspected
from dtq.errors import InputError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@component_option
@click.option(
    "--kernels", is_flag=True, help="Show which kernel runs each layer, and why not another."
)
@click.option("--json", "as_json", is_flag=True)
def inspect(folder: Path, components: tuple[str, ...], kernels: bool, as_json: bool) -> None:
    """Check a quantized FOLDER and show what is in it.

    \b
    dtq inspect demo-w4a8 --kernels
    """
    found = reader.verify(_existing(folder), components or "auto")
    every = {name: inspected(where) for name, where in found.items()}
    if as_json:
        click.echo(json.dumps(every if len(every) > 1 else next(iter(every.values()))))
        return
    for name, data in every.items():
        print_inspected(f"{folder}/{name}" if len(every) > 1 else str(folder), data, kernels)


def _existing(folder: Path) -> Path:
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    return folder
