# SPDX-License-Identifier: Apache-2.0
"""How the CUDA library is compiled: which source files, for which architectures, with which flags.

This module does not import torch, because a wheel is built without it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from dtq.kernels.compile import compiler
from dtq.kernels.compile.compiler import TARGET_VERSION, Build, Unavailable, Unit

SOURCES = (
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
"""What is compiled. Only the C++ files use torch; kernels of one generation are empty elsewhere."""

ARCHS = ("80", "89", "90a", "100", "120f")
"""Of a library that is built ahead. A GPU between two architectures runs the code of the lower."""

_PTX = "80"  # for GPUs newer than all of these: the driver compiles it
_FLAGS = ("-std=c++20", "-O3", TARGET_VERSION)
_HOST = ("-fPIC", "-fvisibility=hidden")  # of the C++ compiler, also where nvcc calls it
_PASSED = f"-Xcompiler={','.join(_HOST)}"
# no contraction: a fused multiply-add rounds once where the reference rounds twice
_DEVICE = (*_FLAGS, "--expt-relaxed-constexpr", "-fmad=false", _PASSED)

LINKED = "--no-as-needed,-ltorch,-ltorch_cpu,--as-needed"
"""Linker flags, in one argument because nvcc would change their order.

libtorch.so needs libtorch_cuda.so where there is one. Through it the library finds torch's stream
without naming a file that a torch without CUDA does not have. No symbol refers to libtorch.so.
"""

_LINK = (f"-Xlinker={LINKED}", "-cudart=static")


def find(*homes: str | None) -> str:
    """nvcc: of the CUDA folders given, of ``CUDA_HOME`` or ``CUDA_PATH``, else on the path.

    Raises:
        Unavailable: there is none.
    """
    named = (*homes, os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    places = [str(Path(home) / "bin" / "nvcc") for home in named if home]
    for place in (*places, "nvcc", "/usr/local/cuda/bin/nvcc"):
        path = shutil.which(place)
        if path:
            return path
    raise Unavailable("no nvcc on the path or in CUDA_HOME")


@functools.cache
def major_version(nvcc: str) -> int:
    """The major version of the CUDA that a compiler belongs to.

    Raises:
        Unavailable: it does not run, or does not say.
    """
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{nvcc} --version: {error}") from error
    found = re.search(r"release (\d+)\.", done.stdout)
    if found is None:
        raise Unavailable(f"{nvcc} --version names no release")
    return int(found[1])


def device_flags(archs: Sequence[str], ptx: bool) -> tuple[str, ...]:
    """Flags of nvcc for a CUDA file; arguments as of :func:`build`."""
    codes = [f"-gencode=arch=compute_{_virtual(a)},code=sm_{a}" for a in archs]
    if ptx:
        codes.append(f"-gencode=arch=compute_{_PTX},code=compute_{_PTX}")
    return (*_DEVICE, *codes)


def _virtual(arch: str) -> str:
    """The architecture of the PTX that machine code is made from.

    No source tells 8.6 or 8.9 from 8.0: their PTX is the same, so nvcc compiles it once for all.
    """
    return _PTX if arch[0] == "8" else arch


def host_flags(archs: Sequence[str], ptx: bool) -> tuple[str, ...]:
    """Flags of the C++ compiler for a C++ file; arguments as of :func:`build`."""
    return (*_FLAGS, *_HOST, _archs_flag(archs, ptx))


def _archs_flag(archs: Sequence[str], ptx: bool) -> str:
    names = " ".join(f"sm_{a}" for a in archs) + (" and PTX" if ptx else "")
    return f'-DDTQ_ARCHS="{names}"'


def _units(archs: Sequence[str], ptx: bool) -> tuple[Unit, ...]:
    host = (*_FLAGS, _PASSED, _archs_flag(archs, ptx))
    device = device_flags(archs, ptx)
    return tuple(
        Unit(s, host, torch=True) if s.endswith(".cpp") else Unit(s, device) for s in SOURCES
    )


def build(nvcc: str, folder: Path, archs: Sequence[str] = ARCHS, ptx: bool = True) -> Build:
    """The CUDA library, compiled by nvcc alone.

    Args:
        nvcc: path of the compiler.
        folder: the sources.
        archs: architectures to make machine code for, as nvcc names them, e.g. ``90a``.
        ptx: whether to add PTX for later GPUs.
    """
    return Build((nvcc,), folder, _units(archs, ptx), _LINK)


def key(folder: Path) -> str:
    """Name of the library that the sources in ``folder`` give, whatever its architectures."""
    return compiler.key(folder, _units((), False), _LINK)


def arch_of(capability: tuple[int, int]) -> str:
    """Name of a GPU in nvcc's flags; ``a`` adds matrix instructions of that generation alone."""
    major, minor = capability
    return f"{major}{minor}{'a' if capability == (9, 0) or major == 12 else ''}"


def wanted_archs(default: Iterable[str] = ARCHS) -> tuple[str, ...]:
    """``DTQ_CUDA_ARCHS``, e.g. ``80;90a``, else the default."""
    named = os.environ.get("DTQ_CUDA_ARCHS", "").replace(",", ";").split(";")
    return tuple(a.strip() for a in named if a.strip()) or tuple(default)
