# SPDX-License-Identifier: Apache-2.0
"""``dtq recipe``: list, show, check and copy recipes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import yaml

from dtq.cli.output import table
from dtq.errors import DtqError, InputError
from dtq.recipe.resolve import Recipe, find, names


@click.group()
def recipe() -> None:
    """List, show, check and copy recipes."""


@recipe.command("ls")
def recipe_ls() -> None:
    """Names and one line each."""
    table(("recipe", "about"), [(name, Recipe.load(name).about) for name in names()])


@recipe.command("show")
@click.argument("name")
def recipe_show(name: str) -> None:
    """A recipe with every default filled in."""
    click.echo(
        yaml.safe_dump(Recipe.load(name).to_dict(), sort_keys=False, allow_unicode=True).rstrip()
    )


@recipe.command("check")
@click.argument("files", nargs=-1, required=True)
def recipe_check(files: Sequence[str]) -> None:
    """Report every mistake in recipe FILES."""
    broken = 0
    for file in files:
        try:
            Recipe.load(file)
            click.echo(f"{file}: good")
        except DtqError as error:
            broken += 1
            click.echo(str(error), err=True)
    if broken:
        sys.exit(1)


@recipe.command("cp")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path))
def recipe_cp(name: str, target: Path) -> None:
    """Copy a recipe to TARGET to edit it."""
    if target.exists():
        raise InputError(f"{target} exists; choose another name")
    if target.suffix not in (".yaml", ".yml"):
        raise InputError(f"{target}: a recipe file ends in .yaml")
    shutil.copyfile(find(name), target)
    click.echo(f"{target}: edit it, then dtq recipe check {target}")
