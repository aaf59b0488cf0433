# SPDX-License-Identifier: Apache-2.0
"""The wheel: with the libraries in it that can be compiled here, else pure Python.

The CPU's takes a C++ compiler, that of GPUs nvcc; both take torch's headers. ``DTQ_KERNELS=0``
never compiles; ``1``, ``cpu`` or ``cuda`` compiles both or that one alone, and fails where it
cannot. Nothing here imports torch or dtq's ``__init__``. Under pip the headers are those of the
torch in the environment that pip installs into: pip hides its packages from the build, not its
folder.
"""

from __future__ import annotations

import importlib
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
        made = compiled(lib, os.environ.get("DTQ_KERNELS", ""))
        self.root_is_pure = not made
        if made:  # else setuptools sets its pure files apart from the libraries
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


def compiled(lib: Path, wanted: str) -> list[str]:
    """The names of the libraries that were made.

    Raises:
        OSError: one that is wanted by name cannot be, or there is none of that name.
    """
    made = []
    if wanted not in ("", "0", "1", "cpu", "cuda"):
        raise OSError(f"DTQ_KERNELS={wanted}: there are 0, 1, cpu and cuda")
    for name, compile_into in (("cpu", for_cpu), ("cuda", for_gpus)):
        if wanted not in ("", "1", name):
            continue
        try:
            compile_into(lib)
            made.append(name)
        except OSError as error:
            if wanted:
                raise
            print(f"dtq: a wheel without {name.upper()} kernels: {error}", file=sys.stderr)
    return made


def for_cpu(lib: Path) -> None:
    """The CPU's library, in the folder of the package that dtq looks into.

    Raises:
        OSError: what is missing, or the compiler's error.
    """
    gcc, sources, home = module("gcc"), ROOT / "cpu_ext", needed()
    with tempfile.TemporaryDirectory() as work:
        made = gcc.compile_library(gcc.find(), sources, home, Path(work))
        put(made, lib / f"dtq_cpu-{gcc.key(sources)}.so")


def for_gpus(lib: Path) -> None:
    """The same for GPUs."""
    nvcc, sources, home = module("nvcc"), ROOT / "cuda_ext", needed()
    compiler = nvcc.find_nvcc()
    if compiler is None:
        raise OSError("no nvcc on the path or in CUDA_HOME")
    with tempfile.TemporaryDirectory() as work:
        made = nvcc.compile_library(compiler, sources, home, Path(work), nvcc.wanted_archs())
        put(made, lib / f"dtq_cuda-{nvcc.key(sources)}.so")


def put(made: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made, target)


def needed() -> Path:
    """The folder of torch, on a system for which there are kernels.

    Raises:
        OSError: one of both is not there.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"no kernels for {sys.platform} yet")
    home = torch_home()
    if home is None:
        raise OSError("no torch in this environment, whose headers are needed")
    return home


def torch_home() -> Path | None:
    """The installed torch, without importing it."""
    places = [Path(p) for p in sys.path] + [Path(sysconfig.get_path("purelib"))]
    return next(
        (p / "torch" for p in places if (p / "torch/include/torch/headeronly").exists()), None
    )


def module(name: str) -> ModuleType:
    """A module of ``dtq/kernels/compile``, without the ``__init__`` files, which import torch."""
    for package in ("dtq", "dtq.kernels", "dtq.kernels.compile"):
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(ROOT.joinpath(*package.split(".")))]
    return importlib.import_module(f"dtq.kernels.compile.{name}")
