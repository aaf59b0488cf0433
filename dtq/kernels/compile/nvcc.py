# SPDX-License-Identifier: Apache-2.0
"""How the CUDA library is compiled: which file for which architectures, with what flags.

The standard library only: building a wheel reads this file without torch
(``cuda_ext/build_kernels.py``). torch's stable ABI is the only thing of torch that the library
uses, so its headers may be those of a torch without CUDA, and one file serves every torch from
2.10 and every Python.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dtq.kernels.compile.compiler import common, digest, run, target

ARCHS = ("80", "89", "90a", "100", "120f")
"""Machine code in a library that is built ahead; what lies between runs that of the one before."""

PTX = "80"
"""For GPUs that are newer than all of these: the driver compiles it."""

FLAGS = ("-std=c++20", "-O3", f"-DTORCH_TARGET_VERSION={target()}")
"""Of every file."""

DEVICE = (
    "--expt-relaxed-constexpr",
    # no contraction: a fused multiply-add rounds once where the reference rounds twice
    "-fmad=false",
)
"""Of nvcc alone."""

HOST = ("-fPIC", "-fvisibility=hidden")
"""Of the C++ compiler, also where nvcc calls it."""

# libtorch.so needs libtorch_cuda.so where there is one, so the library finds the stream of torch
# without naming a file that a torch without CUDA does not have
LINKED = "--no-as-needed,-ltorch,-ltorch_cpu,--as-needed"
"""For the linker, in one argument: nvcc would change the order. The first is needed by no name."""


UNITS = (
    "gemm.cu",
    "gemm_int8.cu",
    "gemm_two_level.cu",
    "gemm_table.cu",
    "gemm_fp4.cu",
    "rows.cu",
    "weights.cu",
    "ops_gemm.cpp",
    "ops_rows.cpp",
)
"""The source files. The C++ ones know of torch; kernels of one generation are empty elsewhere."""


def find_nvcc(*homes: str | None) -> str | None:
    """The compiler: of the CUDA folders given, ``CUDA_HOME`` or ``CUDA_PATH``, else on the path."""
    named = (*homes, os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    for home in filter(None, named):
        found = shutil.which(str(Path(home) / "bin" / "nvcc"))
        if found:
            return found
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def sources(folder: Path) -> list[Path]:
    """Everything that the library is made of, but the headers of ``compiler.common``."""
    kinds = (".cpp", ".cu", ".cuh", ".h", ".inc")
    return sorted(path for path in folder.iterdir() if path.suffix in kinds)


def host_flags(archs: Sequence[str], ptx: bool) -> list[str]:
    """Of a C++ file, for the C++ compiler; arguments as of :func:`commands`."""
    return [*FLAGS, *HOST, _named(archs, ptx)]


def device_flags(archs: Sequence[str], ptx: bool) -> list[str]:
    """Of a CUDA file, for nvcc."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    if ptx:
        codes.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
    return [*FLAGS, *DEVICE, _passed(), *codes]


def _named(archs: Sequence[str], ptx: bool) -> str:
    named = " ".join(f"sm_{a}" for a in archs) + (" and PTX" if ptx else "")
    return f'-DDTQ_ARCHS="{named}"'


def _passed() -> str:
    return f"-Xcompiler={','.join(HOST)}"


def commands(
    nvcc: str, folder: Path, torch_home: Path, work: Path, archs: Sequence[str], ptx: bool
) -> tuple[list[list[str]], list[str]]:
    """One command for each source file, and the one that links what they made.

    Args:
        folder: the sources.
        torch_home: the installed package, for headers and for ``libtorch.so``.
        work: gets the objects, and ``library.so``.
        archs: those wanted, from ``ARCHS`` or like them.
        ptx: whether to add PTX for later GPUs.
    """
    device = device_flags(archs, ptx)
    host = [*FLAGS, _passed(), _named(archs, ptx), "-isystem", str(torch_home / "include")]
    objects = [str(work / f"{Path(unit).stem}.o") for unit in UNITS]
    compiling = [
        [
            nvcc,
            *(host if unit.endswith(".cpp") else device),
            *("-c", str(folder / unit)),
            *("-o", target),
        ]
        for unit, target in zip(UNITS, objects, strict=True)
    ]
    libraries = [f"-L{torch_home / 'lib'}", f"-Xlinker={LINKED}"]
    output = str(work / "library.so")
    return compiling, [nvcc, "-shared", "-cudart=static", *objects, *libraries, "-o", output]


def compile_library(
    nvcc: str,
    folder: Path,
    torch_home: Path,
    work: Path,
    archs: Sequence[str] = ARCHS,
    ptx: bool = True,
) -> Path:
    """Compile and link; see :func:`commands`.

    Raises:
        OSError: nvcc failed; its first error is in the message.
    """
    compiling, linking = commands(nvcc, folder, torch_home, work, archs, ptx)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: run(command, "nvcc"), compiling))
    run(linking, "nvcc")
    return work / "library.so"


def key(folder: Path) -> str:
    """Names everything that a library depends on but the architectures."""
    made_with = platform.machine(), FLAGS, DEVICE, HOST, LINKED, UNITS
    return digest([*sources(folder), *common(folder)], *made_with)


def arch_of(capability: tuple[int, int]) -> str:
    """nvcc's name of a device; ``a`` for the matrix instructions of one generation alone."""
    major, minor = capability
    return f"{major}{minor}{'a' if capability == (9, 0) or major == 12 else ''}"


def wanted_archs(default: Iterable[str] = ARCHS) -> tuple[str, ...]:
    """``DTQ_CUDA_ARCHS=80;90a``, else the default."""
    named = os.environ.get("DTQ_CUDA_ARCHS", "").replace(",", ";").split(";")
    return tuple(a.strip() for a in named if a.strip()) or tuple(default)
