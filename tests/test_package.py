# SPDX-License-Identifier: Apache-2.0
"""What pip installs: data files inside, nothing at top level but dtq, no torch to build it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dtq
from dtq.data import folder

ROOT = Path(__file__).parent.parent


def test_building_needs_no_torch_and_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not any("torch" in need for need in project["build-system"]["requires"])
    assert project["project"]["version"] == dtq.__version__
    assert f"## {dtq.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "dtq").rglob("__init__.py")
    }
    data = {f"dtq._{name}" for name in ("recipes", "calibration", "gate", "cpu_ext")}
    assert found | data == set(project["tool"]["setuptools"]["packages"])


@pytest.mark.slow
def test_the_wheel_has_everything(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n.split("/")[0].split("-")[0] for n in names} == {"dtq"}
    for path in folder("recipes").glob("*.yaml"):
        assert f"dtq/_recipes/{path.name}" in names
    assert "dtq/_calibration/prompts-64.txt" in names
    assert "dtq/_gate/default.yaml" in names
    assert "dtq/demo/pipeline/transformer/diffusion_pytorch_model.safetensors" in names
    assert "dtq/demo/pipeline/README.md" in names
    assert "dtq/py.typed" in names
    for path in folder("cpu_ext").iterdir():
        assert f"dtq/_cpu_ext/{path.name}" in names


def test_missing_data_folders_are_reported():
    with pytest.raises(FileNotFoundError, match="reinstall"):
        folder("nonsense")
