# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels: how they are compiled, and which instruction set they use.

``DTQ_CPU_ISA=`` ref, avx2, avxvnni, vnni or amx chooses the instruction set instead of the best
proven one.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dtq.data import folder
from dtq.kernels.decode import tell
from dtq.kernels.native import Library, Unavailable, digest, run

ISAS = ("ref", "avx2", "avxvnni", "vnni", "amx")
"""Instruction sets, from the plainest to the fastest; ref is portable C++."""

_log = logging.getLogger(__name__)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
# no contraction: a fused multiply-add rounds once where the reference rounds twice; sums of codes
# may wrap around on the way
_KERNEL = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fwrapv", "-w")
# OpenMP at compile time, else at::parallel_for is a plain loop; not at link time: the functions are
# those of the OpenMP library that torch has loaded
GLUE = ("-O2", "-fopenmp", "-w")


@dataclass(frozen=True)
class Unit:
    """A source file and what it is compiled with."""

    source: str
    flags: tuple[str, ...]
    name: str
    x86: bool = False


UNITS = (
    Unit("isa_ref.cpp", _KERNEL, "ref"),
    Unit("isa_avx2.cpp", (*_KERNEL, *_AVX2), "avx2", x86=True),
    Unit("isa_avx2.cpp", (*_KERNEL, *_AVX2, "-mavxvnni"), "avxvnni", x86=True),
    Unit("isa_vnni.cpp", (*_KERNEL, *_AVX512), "vnni", x86=True),
    Unit("isa_amx.cpp", (*_KERNEL, *_AVX512, "-mamx-tile", "-mamx-int8"), "amx", x86=True),
    Unit("dispatch.cpp", _KERNEL, "dispatch"),
    Unit("ops.cpp", GLUE, "ops"),
    Unit("ops_stored.cpp", GLUE, "ops_stored"),
)


def isa() -> str | None:
    """The instruction set in use; None without the library."""
    return None if CPU.opened is None else str(CPU.opened.dtq_isa().decode())


def use(name: str | None) -> str:
    """Use an instruction set, or the fastest below it that this machine has; None for the fastest.

    Returns:
        The one that is used.
    """
    assert CPU.opened is not None, "CPU.load() first"
    wanted = None if name is None else name.encode()
    if not CPU.opened.dtq_use(wanted):
        _log.warning("dtq: no %s kernels on this CPU (known: %s)", name, ", ".join(ISAS))
    return isa() or ""


def peak(rounds: int = 5) -> float:
    """Integer operations a second of CPU time that one thread does in registers, the best of a few.

    0 without the library, and for an instruction set that has no instruction for them.
    """
    if CPU.opened is None:
        return 0.0
    best, count = 0.0, 2_000_000
    for _ in range(rounds):
        started = time.thread_time()
        done = CPU.opened.dtq_peak(count)
        best = max(best, done / (time.thread_time() - started))
    return best


def _sources() -> Path:
    return folder("cpu_ext")


@functools.cache
def _key() -> str:
    files = [path for path in _sources().iterdir() if path.suffix in (".cpp", ".h")]
    return digest(files, torch.__version__, platform.machine(), UNITS)


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "clang++", "c++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise Unavailable(f"no C++ compiler ({f'CXX={named}' if named else 'g++ or clang++'})")


def _compile(work: Path) -> Path:
    compiler, torch_home = _compiler(), Path(torch.__file__).parent
    include = torch_home / "include"
    common = ["-std=c++20", "-fPIC", "-fvisibility=hidden"]
    headers = ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    x86 = platform.machine() in ("x86_64", "AMD64")

    def translate(unit: Unit) -> str:
        source, target = str(_sources() / unit.source), str(work / f"{unit.name}.o")
        extra = headers if unit.flags == GLUE else []
        run([*compiler, *common, *unit.flags, *extra, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(translate, [u for u in UNITS if x86 or not u.x86]))
    library = work / "library.so"
    torch_libraries = [f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"]
    run([*compiler, "-shared", *objects, *torch_libraries, "-o", str(library)])
    return library


def _prepare(library: ctypes.CDLL) -> None:
    library.dtq_isa.restype = ctypes.c_char_p
    library.dtq_use.argtypes = [ctypes.c_char_p]
    library.dtq_peak.argtypes, library.dtq_peak.restype = [ctypes.c_int64], ctypes.c_int64
    tell(library.dtq_cpu_format)
    wanted = os.environ.get("DTQ_CPU_ISA")
    if wanted and not library.dtq_use(wanted.encode()):
        used = library.dtq_isa().decode()
        _log.warning("dtq: DTQ_CPU_ISA=%s: not on this CPU, %s is used", wanted, used)


CPU = Library(
    device="cpu",
    title="CPU",
    ops=(
        "quantize_rows",
        "w8a8_linear",
        "w4a8_linear",
        "lut4a8_linear",
        "group_a8_linear",
        "dequantize",
        "weight_linear",
        "gelu",
    ),
    key=_key,
    compile=_compile,
    compiler=lambda: _compiler()[0],
    prepare=_prepare,
    says=lambda library: str(library.dtq_isa().decode()),
)
