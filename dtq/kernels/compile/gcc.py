# SPDX-License-Identifier: Apache-2.0
"""How the CPU library is compiled: which source file for which instruction set, with which flags.

This module does not import torch, because a wheel is built without it.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from pathlib import Path

from dtq.kernels.compile import compiler
from dtq.kernels.compile.compiler import TARGET_VERSION, Build, Unavailable, Unit

_ALL = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-w")
# no contraction: a fused multiply-add rounds once where the reference rounds twice; integer sums
# may wrap around on the way
_KERNEL = (*_ALL, "-O3", "-ffp-contract=off", "-fno-math-errno", "-fwrapv")
_AVX2 = (*_KERNEL, "-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_BINDING = (*_ALL, "-O2", TARGET_VERSION)

UNITS = (
    Unit("isa_ref.cpp", _KERNEL, name="ref"),
    Unit("isa_avx2.cpp", _AVX2, name="avx2", machine="x86"),
    Unit("isa_avx2.cpp", (*_AVX2, "-mavxvnni"), name="avxvnni", machine="x86"),
    Unit("isa_vnni.cpp", _AVX512, name="vnni", machine="x86"),
    Unit("isa_amx.cpp", (*_AVX512, "-mamx-tile", "-mamx-int8"), name="amx", machine="x86"),
    Unit("isa_neon.cpp", (*_KERNEL, "-march=armv8.2-a+dotprod"), name="neon", machine="arm"),
    Unit("dispatch.cpp", _KERNEL),
    Unit("ops.cpp", _BINDING, torch=True),
    Unit("ops_stored.cpp", _BINDING, torch=True),
    Unit("ops_attention.cpp", _BINDING, torch=True),
)
"""The source files for all processor architectures."""

_MACHINES = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm", "arm64": "arm"}
_LINK = ("-ltorch_cpu",)


def _units() -> tuple[Unit, ...]:
    machine = _MACHINES.get(platform.machine(), "")
    return tuple(unit for unit in UNITS if unit.machine in ("", machine))


def find() -> tuple[str, ...]:
    """The compiler's command: ``CXX``, else the first C++ compiler on the path.

    Raises:
        Unavailable: there is none.
    """
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "clang++", "c++"]:
        words = tuple(shlex.split(command))
        if words and shutil.which(words[0]):
            return words
    raise Unavailable(f"no C++ compiler ({f'CXX={named}' if named else 'g++ or clang++'})")


def build(folder: Path) -> Build:
    """The CPU library for this processor architecture, from the sources in ``folder``.

    Raises:
        Unavailable: there is no compiler.
    """
    return Build(find(), folder, _units(), _LINK)


def key(folder: Path) -> str:
    """Name of the library that the sources in ``folder`` give."""
    return compiler.key(folder, _units(), _LINK)
