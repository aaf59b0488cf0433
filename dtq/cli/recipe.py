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
from dtq.io.package_data import folder
from dtq.io.safe_parse import LARGEST_YAML, parse_yaml, read_text


@click.group()
def recipe() -> None:
    """List, show, check and copy recipes.

    \b
    dtq recipe ls
    dtq recipe cp w4a8 mine.yaml
    dtq recipe check mine.yaml
    """


@recipe.command("ls")
def recipe_ls() -> None:
    """List the recipes that dtq ships.

    \b
    dtq recipe ls
    """
    paths = sorted(folder("recipes").rglob("*.yaml"), key=lambda path: path.stem)
    recipes = [(path.stem, parse_yaml(read_text(path, LARGEST_YAML), str(path))) for path in paths]
    table(("recipe", "about"), [(name, data.get("about", "")) for name, data in recipes])


@recipe.command("show")
@click.argument("name")
def recipe_show(name: str) -> None:
    """Print the recipe NAME with every default filled in.

    NAME is a name of dtq recipe ls, or a YAML file.

    \b
    dtq recipe show w4a8
    """
    from dtq.recipe import Recipe

    data = Recipe.load(name).to_dict()
    click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip())


@recipe.command("check")
@click.argument("files", nargs=-1, required=True)
def recipe_check(files: Sequence[str]) -> None:
    """Report every mistake in recipe FILES.

    \b
    dtq recipe check mine.yaml
    """
    from dtq.recipe import Recipe

    errors = 0
    for file in files:
        try:
            Recipe.load(file)
            click.echo(f"{file}: good")
        except DtqError as error:
            errors += 1
            click.echo(str(error), err=True)
    if errors:
        sys.exit(1)


@recipe.command("cp")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path))
def recipe_cp(name: str, target: Path) -> None:
    """Copy the recipe NAME to the file TARGET, to edit it.

    NAME is a name of dtq recipe ls, or a YAML file. TARGET is a new .yaml file.

    \b
    dtq recipe cp w4a8 mine.yaml
    """
    from dtq.recipe import find

    if target.exists():
        raise InputError(f"{target} exists; choose another name")
    if target.suffix not in (".yaml", ".yml"):
        raise InputError(f"{target}: a recipe file ends in .yaml")
    shutil.copyfile(find(name), target)
    click.echo(f"{target}: edit it, then dtq recipe check {target}")
