# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels: find them, else compile them once, else say why not.

The rungs, best first: the library beside the package (``make kernels``), the one in the user's
cache, a compilation into that cache when a quantized layer first runs on the CPU, the torch
reference. ``DTQ_KERNELS=0`` leaves only the last; ``DTQ_CPU_ISA=`` ref, avx2, avxvnni, vnni or amx
chooses the instruction set instead of the best proven one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dtq.data import folder

ISAS = ("ref", "avx2", "avxvnni", "vnni", "amx")
"""Instruction sets, from the plainest to the fastest; ref is portable C++."""

OPS = ("quantize_rows", "w8a8_linear", "w4a8_linear")
"""What the library implements."""

_log = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parent.parent
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
# no contraction: a fused multiply-add rounds once where the reference rounds twice
_KERNEL = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-w")


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
    # OpenMP at compile time, else at::parallel_for is a plain loop; not at link time: the functions
    # are those of the OpenMP library that torch has loaded
    Unit("ops.cpp", ("-O2", "-fopenmp", "-w"), "ops"),
)


@dataclass
class State:
    """What came of the one attempt of this process.

    Attributes:
        tried: whether there was one.
        path: the library in use.
        reason: why there is none.
    """

    tried: bool = False
    path: Path | None = None
    reason: str = ""


_state = State()
_once = threading.RLock()


def load() -> bool:
    """Make the compiled kernels the CPU implementation of the ops; compile them if need be.

    Returns:
        Whether they are in use. The first answer holds for the life of the process.
    """
    if _state.tried:
        return _state.path is not None
    with _once:
        if not _state.tried:
            try:
                _state.path = _ready()
                _library(_state.path)
            except _Unavailable as reason:
                _state.path, _state.reason = None, str(reason)
                _log.log(
                    logging.INFO if _switched_off() else logging.WARNING,
                    "dtq: the torch reference runs on the CPU: %s",
                    reason,
                )
            _state.tried = True
    return _state.path is not None


def isa() -> str | None:
    """The instruction set in use; None without the library."""
    return None if _state.path is None else str(_library(_state.path).dtq_isa().decode())


def use(name: str | None) -> str:
    """Use an instruction set, or the fastest below it that this machine has; None for the fastest.

    Returns:
        The one that is used.
    """
    assert _state.path is not None, "load() first"
    wanted = None if name is None else name.encode()
    if not _library(_state.path).dtq_use(wanted):
        _log.warning("dtq: no %s kernels on this CPU (known: %s)", name, ", ".join(ISAS))
    return isa() or ""


def describe() -> str:
    """What runs on the CPU, without compiling anything: for ``explain`` and ``dtq doctor``."""
    if _state.path is not None:
        return f"{isa()} kernels, {_where(_state.path)}"
    if _state.tried:
        return f"torch reference: {_state.reason}"
    try:
        found = _built()
        if found is not None:
            return f"compiled kernels, {_where(found)}"
        return f"compiled kernels, built at first use by {_compiler()[0]}"
    except _Unavailable as reason:
        return f"torch reference: {reason}"


def build(target: Path) -> Path:
    """Compile the library into ``target``.

    Raises:
        OSError: the compiler failed; its first error is in the message.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as work:
            # renamed when it is whole: nobody loads half a library
            os.replace(_compile(Path(work)), target)
    except _Unavailable as error:
        raise OSError(str(error)) from error
    return target


def ahead() -> Path:
    """Compile the library to its place beside the package: ``make kernels``."""
    return build(_beside())


class _Unavailable(Exception):
    """Why there are no compiled kernels."""


def _switched_off() -> bool:
    return os.environ.get("DTQ_KERNELS") == "0"


def _ready() -> Path:
    """The library, compiled now if there is none yet."""
    found = _built()
    if found is not None:
        return found
    _compiler()
    target = _cached()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():  # another process may have been first
                print("dtq: compiling CPU kernels, once (~30 s)", file=sys.stderr, flush=True)
                build(target)
    except OSError as error:
        raise _Unavailable(" ".join(str(error).split())) from error
    return target


def _built() -> Path | None:
    """A library that is there already, beside the package or in the cache."""
    if _switched_off():
        raise _Unavailable("DTQ_KERNELS=0")
    if sys.platform != "linux":
        raise _Unavailable(f"no kernels for {sys.platform} yet")
    return next((path for path in (_beside(), _cached()) if path.exists()), None)


def _beside() -> Path:
    return _PACKAGE / "_lib" / f"dtq_cpu-{_key()}.so"


def _cached() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "dtq" / f"dtq_cpu-{_key()}.so"


def _where(path: Path) -> str:
    return "built ahead" if path == _beside() else f"cached in {path.parent}"


@functools.cache
def _key() -> str:
    """Names everything that the binary depends on."""
    digest = hashlib.sha256(f"{torch.__version__} {platform.machine()} {UNITS}".encode())
    for path in sorted(_sources().iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _sources() -> Path:
    return folder("cpu_ext")


def _compiler() -> list[str]:
    """The command that compiles C++.

    Raises:
        _Unavailable: there is none.
    """
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "clang++", "c++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise _Unavailable(f"no C++ compiler ({f'CXX={named}' if named else 'g++ or clang++'})")


def _compile(work: Path) -> Path:
    compiler, torch_home = _compiler(), Path(torch.__file__).parent
    include = torch_home / "include"
    common = ["-std=c++20", "-fPIC", "-fvisibility=hidden"]
    headers = ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    x86 = platform.machine() in ("x86_64", "AMD64")

    def translate(unit: Unit) -> str:
        source, target = str(_sources() / unit.source), str(work / f"{unit.name}.o")
        extra = headers if unit.name == "ops" else []
        _call([*compiler, *common, *unit.flags, *extra, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(translate, [u for u in UNITS if x86 or not u.x86]))
    library = work / "library.so"
    torch_libraries = [f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"]
    _call([*compiler, "-shared", *objects, *torch_libraries, "-o", str(library)])
    return library


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        first = next(
            (line for line in lines if "error" in line), lines[0] if lines else "no output"
        )
        raise _Unavailable(f"{command[0]} failed: {first.strip()}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where nothing is compiled

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _library(path: Path) -> ctypes.CDLL:
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _Unavailable(" ".join(str(error.__cause__ or error).split())) from error
    library.dtq_isa.restype = ctypes.c_char_p
    library.dtq_use.argtypes = [ctypes.c_char_p]
    wanted = os.environ.get("DTQ_CPU_ISA")
    if wanted and not library.dtq_use(wanted.encode()):
        used = library.dtq_isa().decode()
        _log.warning("dtq: DTQ_CPU_ISA=%s: not on this CPU, %s is used", wanted, used)
    return library
