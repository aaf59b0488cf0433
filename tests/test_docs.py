# SPDX-License-Identifier: Apache-2.0
"""What README and docs name exists: commands, options, files, table members."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import click
import pytest
import zoo

from dtq.cli import main
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io.package_data import yaml_names
from dtq.solvers import SOLVERS
from dtq.transforms import TRANSFORMS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.S):
            found += [
                (page.name, line.strip())
                for line in block.splitlines()
                if line.strip().startswith("dtq ")
            ]
    return found


def test_there_are_commands_to_check():
    assert len(commands()) >= 3


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_parses(page, line):
    words = shlex.split(line, comments=True)[1:]
    group: click.Command = main
    while isinstance(group, click.Group):
        context = group.make_context(line, words)
        words = [*context._protected_args, *context.args]
        _, group, words = group.resolve_command(context, words)
    group.make_context(line, words)


def test_tables_are_documented():
    formats = (ROOT / "docs/formats.md").read_text()
    recipes = (ROOT / "docs/recipes.md").read_text() + (ROOT / "README.md").read_text()
    for name in [*FORMATS, *ACTIVATION_FORMATS]:
        stem, _, group = name.rpartition("-")
        assert f"`{name}`" in formats or (
            f"`{stem}-g32`" in formats and f"`-{group}`" in formats
        ), name
    for name in [*TRANSFORMS, *SOLVERS, *yaml_names("recipes")]:
        assert f"`{name}`" in recipes, name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_pages_name_exist(page):
    for name in re.findall(
        r"`((?:dtq|tests|recipes|calibration|docs|cuda_ext|cpu_ext|common_ext)/[\w/.-]+\.\w+)",
        page.read_text(),
    ):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_script_of_the_bundled_model_runs(tmp_path, monkeypatch, capsys):
    line = f"demo.py --every 90 --steps 1 --sheet-steps 1 --rows 2 --guidance 4 --out {tmp_path}/sheet.png"
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    runpy.run_path(str(ROOT / "scripts/demo.py"), run_name="__main__")
    assert "2 labels, 1 steps, guidance 4: first guess" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_the_page_of_models_has_every_class():
    page = (ROOT / "docs" / "models.md").read_text()
    listed = {line.split(" ")[1] for line in page.splitlines() if line.startswith("| ")}
    assert set(zoo.names()) <= listed


def test_the_glossary_has_at_most_25_terms_of_dtq():
    own, standard, _ = (ROOT / "docs" / "glossary.md").read_text().partition("## Standard terms")
    assert standard
    assert 15 < len(re.findall(r"^\| (?!term |---)", own, re.M)) <= 25
