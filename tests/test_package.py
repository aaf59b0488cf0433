# SPDX-License-Identifier: Apache-2.0
"""What pip installs: dtq with its data files and nothing else; building it needs no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dtq
from dtq.io.package_data import folder
from dtq.kernels.compile import compiler, cpu, cuda

ROOT = Path(__file__).parent.parent


def test_building_needs_no_torch_and_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not any("torch" in need for need in project["build-system"]["requires"])
    assert project["project"]["dynamic"] == ["version"]  # it stands once, in dtq/version.py
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "dtq.version.__version__"
    assert f"## {dtq.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "dtq").rglob("__init__.py")
    }
    data = ("recipes", "calibration", "gate", "cpu_ext", "cuda_ext")
    found |= {"dtq.common_ext", *(f"dtq._{name}" for name in data)}
    assert found == set(project["tool"]["setuptools"]["packages"])


def wheel(tmp_path, isolated=False, **variables) -> Path:
    """Build one; ``isolated``: in a new environment, as pip does for users."""
    source = tmp_path / "source"  # setuptools builds in place, while other tests run
    leave = shutil.ignore_patterns(".*", "build", "tests", "docs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=leave)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source]
    if not isolated:
        command.append("--no-build-isolation")
    subprocess.run(command, check=True, env={**os.environ, **variables})
    (made,) = tmp_path.glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_has_everything(tmp_path):
    made = wheel(tmp_path, isolated=True, DTQ_KERNELS="0")
    assert made.name == f"dtq-{dtq.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(made).namelist())
    assert {n.split("/")[0].split("-")[0] for n in names} == {"dtq"}
    for path in folder("recipes").glob("*.yaml"):
        assert f"dtq/_recipes/{path.name}" in names
    assert "dtq/_calibration/prompts-64.txt" in names
    assert "dtq/_gate/default.yaml" in names
    assert "dtq/demo/pipeline/transformer/diffusion_pytorch_model.safetensors" in names
    assert "dtq/demo/pipeline/README.md" in names
    assert "dtq/py.typed" in names
    templates = "evaluate/report/templates"
    for path in (ROOT / "dtq" / templates).iterdir():
        assert f"dtq/{templates}/{path.name}" in names
    for path in filter(Path.is_file, folder("cpu_ext").iterdir()):
        assert f"dtq/_cpu_ext/{path.name}" in names
    for path in compiler.sources(folder("cuda_ext")):
        assert f"dtq/_cuda_ext/{path.name}" in names
    for path in (ROOT / "common_ext").iterdir():
        assert f"dtq/common_ext/{path.name}" in names
    assert not any(name.endswith(".so") for name in names)


@pytest.fixture
def fake_nvcc(tmp_path) -> Path:
    """An nvcc that writes a word into its output file."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "nvcc"
    script.write_text('#!/bin/sh\nfor f; do :; done\necho made > "$f"\n')
    script.chmod(0o755)
    return home


@pytest.mark.slow
def test_with_nvcc_the_wheel_has_the_library(tmp_path, fake_nvcc):
    made = wheel(tmp_path / "out", CUDA_HOME=str(fake_nvcc), DTQ_KERNELS="cuda")
    assert "-py3-none-linux_" in made.name
    with zipfile.ZipFile(made) as inside:
        (library,) = [name for name in inside.namelist() if name.endswith(".so")]
        assert library == f"dtq/_lib/{cuda.CUDA.packaged().name}"
        assert inside.read(library) == b"made\n"


@pytest.mark.slow
def test_a_compiler_that_fails_gives_a_pure_wheel(tmp_path, fake_nvcc):
    (fake_nvcc / "bin" / "nvcc").write_text("#!/bin/sh\necho 'x.cu: error: no' >&2\nexit 1\n")
    made = wheel(tmp_path / "out", CUDA_HOME=str(fake_nvcc), CXX="no-such-compiler")
    assert "none-any" in made.name
    with pytest.raises(subprocess.CalledProcessError):
        wheel(tmp_path / "no", CUDA_HOME=str(fake_nvcc), DTQ_KERNELS="cuda")


def test_an_unknown_library_is_an_error(tmp_path):
    sys.path.insert(0, str(ROOT))
    try:
        from cuda_ext.build_kernels import compiled
    finally:
        sys.path.remove(str(ROOT))
    assert compiled(tmp_path, "0") == []
    with pytest.raises(OSError, match="DTQ_KERNELS=gpu: there are 0, 1, cpu and cuda"):
        compiled(tmp_path, "gpu")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_wheel_brings_compiled_cpu_kernels_to_a_machine_without_a_compiler(tmp_path):
    # the tests of the kernels compile with optimization; the last -O counts
    quick = tmp_path / "quick-g++"
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    quick.chmod(0o755)
    made = wheel(tmp_path / "out", DTQ_KERNELS="cpu", CXX=str(quick))
    assert "-py3-none-linux_" in made.name
    site = tmp_path / "site"
    with zipfile.ZipFile(made) as inside:
        (library,) = [name for name in inside.namelist() if name.endswith(".so")]
        inside.extractall(site)
    assert library == f"dtq/_lib/{cpu.CPU.packaged().name}"
    code = (
        "from dtq.kernels import CPU; import dtq; print(dtq.__file__, CPU.load(), CPU.describe())"
    )
    bare = {"PYTHONPATH": str(site), "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    output = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | bare, cwd=tmp_path, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert output.startswith(str(site))
    assert " True " in output
    assert output.strip().endswith("kernels, built ahead")


def test_missing_data_folders_are_reported():
    with pytest.raises(FileNotFoundError, match="reinstall"):
        folder("nonsense")
