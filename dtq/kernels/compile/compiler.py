# SPDX-License-Identifier: Apache-2.0
"""One driver for both libraries: a table of source files with their flags, then one link command.

``gcc.py`` and ``nvcc.py`` describe the CPU library and the CUDA library as a :class:`Build`. Only
the standard library and ``dtq.io.checksum`` are imported, because a wheel is built without torch
(``cuda_ext/build_kernels.py``). The libraries use nothing of torch but its stable ABI, so one file
serves every torch from 2.10 and every Python, and the headers may be those of a torch without CUDA.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dtq.io import checksum

ABI = (2, 10)
"""The torch version whose stable ABI is used; every later version loads the libraries."""

TARGET_VERSION = f"-DTORCH_TARGET_VERSION=0x{ABI[0]:02x}{ABI[1]:02x}000000000000ULL"
"""Flag that keeps torch's headers to that ABI."""


class Unavailable(OSError):
    """A library cannot be compiled or used; the message is the reason."""


@dataclass(frozen=True)
class Unit:
    """A source file and the flags that compile it.

    Attributes:
        source: file name in the folder of the sources.
        flags: all flags but those for torch's headers.
        torch: whether the file includes torch's headers.
        name: stem of the object file; empty: that of the source. One source may be compiled
            several times.
        machine: the only processor architecture that the unit is for; empty: all.
    """

    source: str
    flags: tuple[str, ...]
    torch: bool = False
    name: str = ""
    machine: str = ""

    @property
    def object(self) -> str:
        """Name of the object file."""
        return f"{self.name or Path(self.source).stem}.o"


@dataclass(frozen=True)
class Build:
    """How a library is compiled.

    Attributes:
        compiler: the command, e.g. ``("ccache", "g++")``.
        folder: the sources.
        units: what is compiled.
        link: flags of the link command; torch's libraries are on its search path.
    """

    compiler: tuple[str, ...]
    folder: Path
    units: tuple[Unit, ...]
    link: tuple[str, ...]

    def commands(self, torch_home: Path, work: Path) -> tuple[list[list[str]], list[str]]:
        """One command per unit, and the one that links the objects to ``library.so``.

        Args:
            torch_home: the folder of the installed torch, for headers and libraries.
            work: the folder of the objects and the library.
        """
        headers = ("-isystem", str(torch_home / "include"))
        compiling, objects = [], []
        for unit in self.units:
            source, target = str(self.folder / unit.source), str(work / unit.object)
            flags = (*unit.flags, *(headers if unit.torch else ()))
            compiling.append([*self.compiler, *flags, "-c", source, "-o", target])
            objects.append(target)
        link = (f"-L{torch_home / 'lib'}", *self.link, "-o", str(work / "library.so"))
        return compiling, [*self.compiler, "-shared", *objects, *link]

    def run(self, torch_home: Path, work: Path) -> Path:
        """Compile the units in parallel and link; arguments as of :meth:`commands`.

        Returns:
            The library, in ``work``.

        Raises:
            Unavailable: a command failed; the message has its first error.
        """
        compiling, linking = self.commands(torch_home, work)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compiling))
        _run(linking)
        return work / "library.so"


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise Unavailable(first_error(Path(command[0]).name, result.stderr + result.stdout))


def first_error(program: str, output: str) -> str:
    """A compiler's first error, in one line."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error:|fatal|\bld: ", line)] or lines
    return f"{program} failed: {errors[0].strip() if errors else 'no output'}"


def sources(folder: Path) -> list[Path]:
    """Every file of a library's own sources, headers included."""
    kinds = (".cpp", ".cu", ".cuh", ".h", ".inc")
    return sorted(path for path in folder.iterdir() if path.suffix in kinds)


def common(folder: Path) -> list[Path]:
    """Headers that both libraries include: ``common_ext``, next to ``folder``."""
    return sorted((folder.parent / "common_ext").glob("*.h"))


@functools.cache
def key(folder: Path, units: tuple[Unit, ...], link: tuple[str, ...]) -> str:
    """Name of the library that the sources in ``folder`` give on this processor architecture."""
    return digest([*sources(folder), *common(folder)], platform.machine(), units, link)


def digest(files: Iterable[Path], *settings: object) -> str:
    """Hash of the names and contents of files, and of settings; 16 hexadecimal digits."""
    ordered = sorted(files, key=lambda path: path.name)  # folders have other names in a wheel
    contents = (path.name.encode() + path.read_bytes() for path in ordered)
    return checksum.digest([" ".join(map(str, settings)).encode(), *contents])[:16]
