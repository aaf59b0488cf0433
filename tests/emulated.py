# SPDX-License-Identifier: Apache-2.0
"""The CUDA library on the block emulator: binding and kernels, on tensors of the CPU.

``library()`` compiles with g++ what nvcc compiles otherwise, once for each state of the sources, into
the user's cache. Its ops are ``torch.ops.dtq_sim``.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dtq.io.package_data import folder
from dtq.kernels import ops
from dtq.kernels.compile import compiler, cuda, nvcc
from dtq.kernels.compile.format_codes import register_formats

FLAGS = [
    "-std=c++20",
    "-O1",
    "-march=native",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-w",
]


@functools.cache
def library() -> ctypes.CDLL:
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("the emulator needs g++ on x86-64")
    path = _built()
    definitions = torch.library.Library("dtq_sim", "DEF")
    for schema, _, _ in ops.OPS:
        if schema.split("(")[0] in cuda.CUDA.ops:
            definitions.define(schema)
    _KEPT.append(definitions)
    torch.ops.load_library(str(path))
    opened = ctypes.CDLL(str(path))
    register_formats(opened.dtq_cuda_format)
    opened.dtq_cuda_gemm.restype = ctypes.c_char_p
    sizes = [ctypes.c_int64] * 3
    opened.dtq_cuda_gemm.argtypes = [ctypes.c_int, ctypes.c_int, *sizes, ctypes.c_int]
    opened.dtq_cuda_references.restype = ctypes.c_int64
    return opened


_KEPT: list[torch.library.Library] = []  # torch drops a library with its last reference


def _built() -> Path:
    sources, home = folder("cuda_ext"), Path(torch.__file__).parent
    files = [*compiler.sources(sources), *compiler.common(sources), *(sources / "sim").iterdir()]
    key = compiler.digest(files, torch.__version__, FLAGS)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtq"
    target = base / f"dtq_sim-{key}.so"
    if target.exists():
        return target
    base.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():  # another process may have been first
            _build(target, sources, home)
    return target


def _build(target: Path, sources: Path, home: Path) -> None:
    work = target.with_suffix(f".{os.getpid()}")
    work.mkdir()
    objects = []
    for unit in nvcc.SOURCES:
        objects.append(str(work / f"{Path(unit).stem}.o"))
        headers = ["-isystem", str(home / "include"), compiler.TARGET_VERSION]
        extra = ['-DDTQ_ARCHS="emulator"', *headers] if unit.endswith(".cpp") else []
        source = ["-x", "c++", "-c", str(sources / unit)]
        subprocess.run(["g++", *FLAGS, "-DDTQ_SIM", *extra, *source, "-o", objects[-1]], check=True)
    made = work / "library.so"
    link = [f"-L{home / 'lib'}", "-ltorch_cpu", "-o", str(made)]
    subprocess.run(["g++", "-shared", *objects, *link], check=True)
    os.replace(made, target)
    shutil.rmtree(work)
