# SPDX-License-Identifier: Apache-2.0
"""How the CPU library is compiled: which file for which instruction set, with what flags.

As in ``nvcc.py`` the standard library only: building a wheel reads this file without torch. torch's
stable ABI is the only thing of torch that the library uses, so one file serves every torch from
2.10 and every Python.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dtq.kernels.compile.compiler import common, digest, run, target

_COMMON = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-w")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
# no contraction: a fused multiply-add rounds once where the reference rounds twice; sums of codes
# may wrap around on the way
_KERNEL = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fwrapv")
GLUE = ("-O2", f"-DTORCH_TARGET_VERSION={target()}")


_MACHINES = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm", "arm64": "arm"}


@dataclass(frozen=True)
class Unit:
    """A source file and what it is compiled with.

    Attributes:
        machine: the only architecture that it is for, a value of ``_MACHINES``; empty: all.
    """

    source: str
    flags: tuple[str, ...]
    name: str
    machine: str = ""


UNITS = (
    Unit("isa_ref.cpp", _KERNEL, "ref"),
    Unit("isa_avx2.cpp", (*_KERNEL, *_AVX2), "avx2", "x86"),
    Unit("isa_avx2.cpp", (*_KERNEL, *_AVX2, "-mavxvnni"), "avxvnni", "x86"),
    Unit("isa_vnni.cpp", (*_KERNEL, *_AVX512), "vnni", "x86"),
    Unit("isa_amx.cpp", (*_KERNEL, *_AVX512, "-mamx-tile", "-mamx-int8"), "amx", "x86"),
    Unit("isa_neon.cpp", (*_KERNEL, "-march=armv8.2-a+dotprod"), "neon", "arm"),
    Unit("dispatch.cpp", _KERNEL, "dispatch"),
    Unit("ops.cpp", GLUE, "ops"),
    Unit("ops_stored.cpp", GLUE, "ops_stored"),
)


def units() -> list[Unit]:
    """Those of this machine's architecture."""
    here = _MACHINES.get(platform.machine(), "")
    return [unit for unit in UNITS if unit.machine in ("", here)]


def sources(folder: Path) -> list[Path]:
    """Everything that the library is made of, but the headers of ``compiler.common``."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))


def key(folder: Path) -> str:
    """Names the library that the sources in ``folder`` give on this architecture."""
    files = [*sources(folder), *common(folder)]
    return digest(files, platform.machine(), _COMMON, units())


def find() -> list[str]:
    """The compiler's command: ``CXX``, else the first there is.

    Raises:
        OSError: there is none.
    """
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "clang++", "c++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise OSError(f"no C++ compiler ({f'CXX={named}' if named else 'g++ or clang++'})")


def compile_library(compiler: Sequence[str], folder: Path, torch_home: Path, work: Path) -> Path:
    """Compile the library into ``work``, files side by side.

    Args:
        folder: the sources.
        torch_home: the installed package, for headers and ``libtorch_cpu.so``.

    Raises:
        OSError: the compiler failed; its first error is in the message.
    """

    def translate(unit: Unit) -> str:
        source, made = str(folder / unit.source), str(work / f"{unit.name}.o")
        headers = ["-isystem", str(torch_home / "include")] if unit.flags == GLUE else []
        run([*compiler, *_COMMON, *unit.flags, *headers, "-c", source, "-o", made], compiler[0])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(translate, units()))
    library = work / "library.so"
    torch = [f"-L{torch_home / 'lib'}", "-ltorch_cpu"]
    run([*compiler, "-shared", *objects, *torch, "-o", str(library)], compiler[0])
    return library
