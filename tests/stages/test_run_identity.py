# SPDX-License-Identifier: Apache-2.0
"""A run is continued only with the same code: every Python file of the package counts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from builders import planned
from conftest import QUICK

import dtq
from dtq.io.package_data import package_root
from dtq.pipelines.loading import load_transformer
from dtq.recipe import Recipe
from dtq.stages import run_identity

FILES = sorted(p.relative_to(package_root()) for p in package_root().rglob("*.py"))


def test_the_package_is_the_whole_package():
    assert package_root() == Path(dtq.__file__).resolve().parent
    folders = {file.parts[0] for file in FILES if len(file.parts) > 1}
    assert {"kernels", "solvers", "stages", "formats", "io"} <= folders


@pytest.fixture(scope="module")
def run():
    return planned(load_transformer(tiny.pipeline()), Recipe.load("rtn-w4a8", **QUICK))


def test_a_change_to_any_python_file_changes_the_identity_of_a_run(run, tmp_path, monkeypatch):
    package = tmp_path / "dtq"
    for file in FILES:
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package_root() / file, package / file)
    monkeypatch.setattr(run_identity, "package_root", lambda: package)

    def digest() -> str:
        return run_identity.run_identity([run], frozenset())["dtq"]

    before = digest()
    assert digest() == before
    # one file of each folder; the digest is of the names and contents of all files
    for file in {file.parent: file for file in FILES}.values():
        text = (package / file).read_text()
        (package / file).write_text(f"{text}# changed\n")
        assert digest() != before, file
        (package / file).write_text(text)
    assert digest() == before
    (package / "kernels" / "new.py").touch()
    assert digest() != before


def test_a_change_to_a_table_of_original_names_changes_it_too(run, tmp_path, monkeypatch):
    folder = Path("engines", "original", "names")
    shutil.copytree(package_root() / folder, tmp_path / folder)
    monkeypatch.setattr(run_identity, "package_root", lambda: tmp_path)
    before = run_identity.run_identity([run], frozenset())
    with (tmp_path / folder / "flux.yaml").open("a") as file:
        file.write("# changed\n")
    after = run_identity.run_identity([run], frozenset())
    assert [key for key in before if before[key] != after[key]] == ["original names"]
