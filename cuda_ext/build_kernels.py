# SPDX-License-Identifier: Apache-2.0
"""The wheel: with the libraries in it that can be compiled here, else pure Python.

The CPU library needs a C++ compiler, the CUDA library nvcc, both the headers of torch.
``DTQ_KERNELS=0`` compiles neither; ``1``, ``cpu`` or ``cuda`` compiles both or the one named, and
fails if that is not possible. Nothing here imports torch or dtq's ``__init__``. Under pip the
headers are those of the torch in the environment that pip installs into: pip hides the packages of
that environment from the build, but not its folder.
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
    """A wheel for every Python 3: the libraries do not use the interpreter."""

    def run(self) -> None:
        lib = Path(self.get_finalized_command("build").build_lib) / "dtq" / "_lib"
        shutil.rmtree(lib, ignore_errors=True)  # of an earlier build
        names = compiled(lib, os.environ.get("DTQ_KERNELS", ""))
        self.root_is_pure = not names
        if names:  # else setuptools puts its pure files in another place than the libraries
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


def compiled(lib: Path, wanted: str) -> list[str]:
    """Compile the wanted libraries into ``lib``; ``wanted`` is the value of ``DTQ_KERNELS``.

    Returns:
        The names of the libraries that were compiled.

    Raises:
        OSError: there is no library of that name, or one that is wanted by name cannot be compiled.
    """
    names = []
    if wanted not in ("", "0", "1", "cpu", "cuda"):
        raise OSError(f"DTQ_KERNELS={wanted}: there are 0, 1, cpu and cuda")
    for name in ("cpu", "cuda"):
        if wanted not in ("", "1", name):
            continue
        try:
            compile_into(lib, name)
            names.append(name)
        except OSError as error:
            if wanted:
                raise
            print(f"dtq: a wheel without {name.upper()} kernels: {error}", file=sys.stderr)
    return names


def compile_into(lib: Path, name: str) -> None:
    """Compile ``cpu`` or ``cuda`` into the folder of the package in which dtq looks for it.

    Raises:
        OSError: what is missing, or the compiler's error.
    """
    home, sources = torch_home(), ROOT / f"{name}_ext"
    if name == "cpu":
        flags = module("gcc")
        build = flags.build(sources)
    else:
        flags = module("nvcc")
        build = flags.build(flags.find(), sources, flags.wanted_archs())
    lib.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        library = build.run(home, Path(work))
        shutil.copyfile(library, lib / f"dtq_{name}-{flags.key(sources)}.so")


def torch_home() -> Path:
    """The folder of the installed torch, without importing it.

    Raises:
        OSError: there is none, or no kernels for this system.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"no kernels for {sys.platform} yet")
    for place in [*map(Path, sys.path), Path(sysconfig.get_path("purelib"))]:
        if (place / "torch/include/torch/headeronly").exists():
            return place / "torch"
    raise OSError("no torch in this environment, whose headers are needed")


def module(name: str) -> ModuleType:
    """A module of ``dtq.kernels.compile``, without running the ``__init__`` of its packages."""
    for package in ("dtq", "dtq.kernels", "dtq.kernels.compile"):
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(ROOT.joinpath(*package.split(".")))]
    return importlib.import_module(f"dtq.kernels.compile.{name}")
