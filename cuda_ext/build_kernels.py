# SPDX-License-Identifier: Apache-2.0
"""The wheel: with the CUDA library in it where nvcc and torch's headers are, else pure Python.

``DTQ_KERNELS=0`` never compiles, ``DTQ_KERNELS=1`` fails where it cannot. Nothing here imports
torch or dtq. Under pip the headers are those of the torch in the environment that pip installs
into: pip hides its packages from the build, not its folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent.parent


class Wheel(bdist_wheel):
    """A wheel for every Python 3: the library has nothing of the interpreter in it."""

    def run(self) -> None:
        lib = Path(self.get_finalized_command("build").build_lib) / "dtq" / "_lib"
        shutil.rmtree(lib, ignore_errors=True)  # of an earlier build
        try:
            made = None if os.environ.get("DTQ_KERNELS") == "0" else compile_into(lib)
        except OSError as error:
            if os.environ.get("DTQ_KERNELS") == "1":
                raise
            made = None
            print(f"dtq: a wheel without CUDA kernels: {error}", file=sys.stderr)
        self.root_is_pure = made is None
        if made:  # else setuptools sets its pure files apart from the library
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


def compile_into(lib: Path) -> Path:
    """The library, in the folder of the package that dtq looks into.

    Raises:
        OSError: what is missing, or nvcc's error.
    """
    nvcc = by_path("nvcc")
    compiler, home = nvcc.find_nvcc(), torch_home()
    if not sys.platform.startswith("linux"):
        raise OSError(f"no kernels for {sys.platform} yet")
    if compiler is None:
        raise OSError("no nvcc on the path or in CUDA_HOME")
    if home is None:
        raise OSError("no torch in this environment, whose headers are needed")
    sources = ROOT / "cuda_ext"
    lib.mkdir(parents=True)
    target = lib / f"dtq_cuda-{nvcc.key(sources)}.so"
    with tempfile.TemporaryDirectory() as work:
        made = nvcc.compile_library(compiler, sources, home, Path(work), nvcc.wanted_archs())
        shutil.copyfile(made, target)
    return target


def torch_home() -> Path | None:
    """The installed torch, without importing it."""
    places = [Path(p) for p in sys.path] + [Path(sysconfig.get_path("purelib"))]
    return next(
        (p / "torch" for p in places if (p / "torch/include/torch/headeronly").exists()), None
    )


def by_path(name: str) -> ModuleType:
    """A module of dtq that needs nothing, without importing dtq."""
    spec = importlib.util.spec_from_file_location(f"_dtq_{name}", ROOT / f"dtq/kernels/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
