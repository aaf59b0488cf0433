# SPDX-License-Identifier: Apache-2.0
"""Whether it loads and is right, as checks of ``tests/gpu.py``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import agreement
import golden
import products
import torch
from gpu_run import Check, Session, Skipped

from dtq.kernels import CUDA
from dtq.kernels.compile import cpp_extension, nvcc
from dtq.kernels.compile.compiler import Unavailable

SOURCES = Path(__file__).parent.parent / "cuda_ext"


# ---------------------------------------------------------------------------- does it load at all


def loading(s: Session) -> None:
    """The library, the weak symbol of torch's stream, every op."""
    s.need_gpu()
    began = time.monotonic()
    loaded = CUDA.load()
    s.tell("library", CUDA.describe(), loaded)
    s.tell("time to load, s", f"{time.monotonic() - began:.1f}")
    for name, state in CUDA.levels():
        s.tell(f"level {name}", state)
    if CUDA.opened is not None:
        has_stream = CUDA.opened.dtq_cuda_has_stream()
        s.tell("stream of torch", has_stream, has_stream == 1)
    keys = [torch._C._dispatch_has_kernel_for_dispatch_key(f"dtq::{n}", "CUDA") for n in CUDA.ops]
    s.tell("ops with a CUDA kernel", f"{sum(keys)} of {len(keys)}", all(keys))


def compiler() -> str:
    """nvcc; skips the check where there is none."""
    try:
        return nvcc.find(cpp_extension.cuda_home())
    except Unavailable as error:
        raise Skipped(str(error)) from error


# ------------------------------------------------------------------------------- is it right


@cache
def _golden(device_type: str, arch: str) -> golden.Library:
    """The kernels of single instructions for a GPU, or for the emulator."""
    folder = Path(tempfile.mkdtemp(prefix="dtq-golden-"))
    if device_type == "cuda":
        return golden.on_gpu(folder, compiler(), arch)
    if shutil.which("g++") is None:
        raise Skipped("the emulator needs g++")
    return golden.emulated(folder)


def instruction(name: str, s: Session) -> str:
    """Instructions give the bits of the emulator."""
    library = _golden(s.device.type, nvcc.arch_of(s.capability))
    major = library.kernels[name].major
    if s.cuda and major not in (0, s.capability[0]):
        raise Skipped(f"needs compute capability {major}")
    got = library.digest(name, s.device)
    if got == golden.EMULATOR[name]:
        return f"the bits of the emulator, {got}"
    differences = library.differences(_golden("cpu", ""), name, s.device)
    raise AssertionError("; ".join(differences[:3]) or f"{got}: the emulator gives other bits here")


KINDS = ("int8", "two-level", "table", "FP4")
"""Of weights, in the order of ``DTQ_ONLY``."""


@cache
def _programs(arch: str) -> dict[str, Path]:
    """The program of ``test_gemm.cpp`` for each kind of weights, compiled at the same time."""
    folder, command = Path(tempfile.mkdtemp(prefix="dtq-programs-")), compiler()

    def build(number: int) -> Path:
        target = folder / str(number)
        flags = ["-std=c++17", "-O2", f"-arch=sm_{arch}", f"-DDTQ_ONLY={number}", "-x", "cu"]
        source = str(SOURCES / "tests/test_gemm.cpp")
        subprocess.run([command, *flags, source, "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(len(KINDS)) as pool:
        return dict(zip(KINDS, pool.map(build, range(len(KINDS))), strict=True))


def program(kind: str, s: Session) -> str:
    """``test_gemm.cpp``, which chooses tiles as for 16 multiprocessors: it reaches every kernel."""
    s.need_gpu()
    if kind == "FP4" and s.capability[0] != 12:
        raise Skipped("needs compute capability 12")
    command = [str(_programs(nvcc.arch_of(s.capability))[kind]), "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    for line in lines:
        if line.startswith("FAIL"):
            s.tell(kind, line, False)
    passed = [line for line in lines if line.startswith("ok")]
    assert done.returncode == 0, f"status {done.returncode}, {len(passed)} cases passed"
    return f"{len(passed)} cases passed"


def name_of(s: Session) -> products.NameOf:
    """What ``dtq_cuda_gemm`` says for this GPU."""
    assert CUDA.load(), CUDA.describe()
    library = CUDA.opened
    assert library is not None
    major, minor = s.capability

    def name(m: int, n: int, k: int, group: int) -> str:
        found = library.dtq_cuda_gemm(major * 10 + minor, s.multiprocessors, m, n, k, group)
        return str(found.decode())

    return name


def coverage(s: Session) -> str:
    """The products below reach every kernel of large tiles, with many steps of K."""
    s.need_gpu()
    gaps = products.missing(s.capability, name_of(s))
    assert not gaps, "; ".join(gaps)
    return "every kernel of large tiles"


def product(case: products.Case, size: tuple[int, int, int], s: Session) -> str:
    """A product of many tiles against float64 on the same device."""
    if s.cuda and case.fp4 and s.capability[0] != 12:
        raise Skipped("needs compute capability 12")
    before, small = references(), (40, 72, 256)
    used = small if s.small else size
    products.run(torch.ops.dtq, s.device, case, used)
    if not s.cuda:
        return f"equal, the torch reference on a CPU, {' x '.join(map(str, used))}"
    assert references() == before, "the torch reference ran"
    return f"equal, {name_of(s)(*used, case.group_of(used[2]))}"


def few_tokens(name: str, size: tuple[int, int, int], s: Session) -> None:
    """A packed weight of a real layer times few tokens, against float64 on the same device."""
    before = references()
    products.weight_only(torch.ops.dtq, s.device, name, (size[0], 72, 256) if s.small else size)
    assert references() == before, "the torch reference ran"


def references() -> int:
    """Calls of the torch reference by the library."""
    return 0 if CUDA.opened is None else int(CUDA.opened.dtq_cuda_references())


def agrees(check: Callable[..., None], s: Session) -> str:
    """A check of ``agreement.py`` on random sizes."""
    if s.cuda and check in agreement.FP4 and s.capability[0] != 12:
        raise Skipped("needs compute capability 12")
    wrong, seeds, unsupported = [], s.size(40, 2), 0
    if s.cuda:
        assert CUDA.load(), CUDA.describe()
    for seed in range(seeds):
        before = references()
        try:
            check(torch.ops.dtq, s.device, seed, s.size(2**30, 10**5))
        except AssertionError as error:
            wrong.append(f"seed {seed}: {error}")
        unsupported += references() > before
    assert not wrong, f"{len(wrong)} of {seeds}: " + "; ".join(wrong[:3])
    assert unsupported < seeds, "the torch reference ran for every size"
    return f"equal, {seeds} random sizes, {unsupported} of them by the torch reference"


# -------------------------------------------------------------------------------- the sanitizer

_SANITIZED = """
import sys
sys.path.insert(0, "tests")
import agreement, products, torch
from dtq.kernels import CUDA
assert CUDA.load(), CUDA.describe()
for check in agreement.CHECKS:
    check(torch.ops.dtq, "cuda", 0, 10**5)
for case in products.cases_for(torch.cuda.get_device_capability()):
    if case.fits(257, 12288, 128):
        products.run(torch.ops.dtq, "cuda", case, (257, 12288, 128))
"""


def sanitizer(kind: str, s: Session) -> str:
    """A tool of compute-sanitizer over small checks and products of large tiles."""
    s.need_gpu()
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None:
        raise Skipped("needs compute-sanitizer")
    command = [tool, f"--tool={kind}", "--error-exitcode=9", sys.executable, "-c", _SANITIZED]
    # it sees nothing inside the blocks that torch keeps
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=SOURCES.parent, capture_output=True, text=True, env=environment, timeout=60
        )
    except subprocess.TimeoutExpired:
        raise Skipped("stopped after 60 s, nothing was reported") from None
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    assert done.returncode == 0, last
    return str(last)


# ------------------------------------------------------------------------------------- the lists


def checks() -> list[Check]:
    """What has to be right, in the order in which a first run needs it."""
    sized = [(case, size) for size in products.SIZES for case in (*products.CASES, *products.FP4)]
    return [
        Check("loading", "library", loading, 300),
        *(Check("instructions", name, partial(instruction, name), 120) for name in golden.EMULATOR),
        *(Check("programs", kind, partial(program, kind), 180) for kind in KINDS),
        Check("products", "coverage", coverage),
        *(
            Check(
                "products",
                f"{case.name}, {' x '.join(map(str, size))}",
                partial(product, case, size),
            )
            for case, size in sized
            if case.fits(*size)
        ),
        *(
            Check(
                "few tokens",
                f"{name}, {' x '.join(map(str, size))}",
                partial(few_tokens, name, size),
            )
            for name in products.WEIGHT_FORMATS
            for size in products.WEIGHT_SIZES
        ),
        *(
            Check("correctness", check.__name__, partial(agrees, check), 120)
            for check in (*agreement.CHECKS, *agreement.FP4)
        ),
    ]


def sanitizer_checks() -> list[Check]:
    """Off by default."""
    return [Check("sanitizer", k, partial(sanitizer, k), 90) for k in ("memcheck", "racecheck")]
