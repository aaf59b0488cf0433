# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels, and the instruction set they use.

``DTQ_CPU_ISA=`` ref, avx2, avxvnni, vnni, amx or neon chooses the instruction set instead of the
fastest one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from pathlib import Path

import torch

from dtq.io.package_data import folder
from dtq.kernels.compile import gcc
from dtq.kernels.compile.format_codes import register_formats
from dtq.kernels.compile.library import Library, check_abi

ISAS = ("ref", "avx2", "avxvnni", "vnni", "amx", "neon")
"""Instruction sets of x86 from the slowest to the fastest, then Arm's; ref is portable C++."""

_log = logging.getLogger(__name__)


def isa() -> str | None:
    """The instruction set in use; None without the library."""
    return None if CPU.opened is None else str(CPU.opened.dtq_isa().decode())


def use(name: str | None) -> str:
    """Use an instruction set, or the fastest below it that this machine has; None for the fastest.

    Returns:
        The one that is used.
    """
    assert CPU.opened is not None, "CPU.load() first"
    if not CPU.opened.dtq_use(None if name is None else name.encode()):
        _log.warning("dtq: no %s kernels on this CPU (known: %s)", name, ", ".join(ISAS))
    return isa() or ""


def peak(rounds: int = 5) -> float:
    """Integer operations per second of CPU time that one thread reaches in registers.

    The best of ``rounds``. 0 without the library, and for an instruction set that has no
    instruction for them.
    """
    if CPU.opened is None:
        return 0.0
    best, count = 0.0, 2_000_000
    for _ in range(rounds):
        started = time.thread_time()
        operations = CPU.opened.dtq_peak(count)
        best = max(best, operations / (time.thread_time() - started))
    return best


def _prepare(library: ctypes.CDLL) -> None:
    library.dtq_isa.restype = ctypes.c_char_p
    library.dtq_use.argtypes = [ctypes.c_char_p]
    library.dtq_peak.argtypes, library.dtq_peak.restype = [ctypes.c_int64], ctypes.c_int64
    register_formats(library.dtq_cpu_format)
    wanted = os.environ.get("DTQ_CPU_ISA")
    if wanted and not library.dtq_use(wanted.encode()):
        used = library.dtq_isa().decode()
        _log.warning("dtq: DTQ_CPU_ISA=%s: not on this CPU, %s is used", wanted, used)


CPU = Library(
    device="cpu",
    title="CPU",
    ops=(
        "quantize_rows",
        "binned_quantize_rows",
        "norm_quantize_rows",
        "e2m1_quantize_rows",
        "transform_rows",
        "round_rows",
        "w8a8_linear",
        "w4a8_linear",
        "w3a8_linear",
        "lut4a8_linear",
        "group_a8_linear",
        "dequantize",
        "weight_linear",
        "float_linear",
        "w8a8_epilogue_linear",
        "w4a8_epilogue_linear",
        "gelu",
        "int8_attention",
    ),
    key=lambda: gcc.key(folder("cpu_ext")),
    compiler=lambda: gcc.find()[0],
    compile=lambda work: gcc.build(folder("cpu_ext")).run(Path(torch.__file__).parent, work),
    check=check_abi,
    prepare=_prepare,
    detail=lambda library: str(library.dtq_isa().decode()),
)
