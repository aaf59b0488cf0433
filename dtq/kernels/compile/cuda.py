# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernels: when they can be used, and how they are compiled at first use.

``torch.utils.cpp_extension`` compiles for the GPUs of this machine (``cpp_extension.py``). Where it
cannot, nvcc is called directly, as for a wheel. Both take their files and flags from ``nvcc.py``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import re
from functools import partial
from pathlib import Path

import torch

from dtq.io.package_data import folder
from dtq.kernels.compile import cpp_extension, nvcc
from dtq.kernels.compile.compiler import Unavailable
from dtq.kernels.compile.format_codes import register_formats
from dtq.kernels.compile.library import Library, check_abi

_log = logging.getLogger(__name__)

OLDEST = (8, 0)
"""Lowest compute capability with kernels: they use the int8 matrix instructions of Ampere."""


def capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that torch can use, ascending."""
    return sorted({capability for capability, _ in gpus()})


def gpus() -> list[tuple[tuple[int, int], str]]:
    """Compute capability and name of each kind of GPU that torch can use, ascending."""
    if not torch.cuda.is_available():
        return []
    count = range(torch.cuda.device_count())
    get = torch.cuda.get_device_capability, torch.cuda.get_device_name
    return sorted({(get[0](i), get[1](i)) for i in count})


def driver_version() -> int | None:
    """The newest CUDA that the driver supports, as 1000 x major + 10 x minor; None: no driver."""
    version = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if status else version.value


def runtime_version(path: Path) -> int | None:
    """The CUDA runtime that is linked into a library, as :func:`driver_version`; None: unknown.

    Read from the file without loading it: what is loaded has replaced torch's ops already.
    """
    found = re.search(rb"dtq cudart (\d+)", path.read_bytes())
    return int(found[1]) if found else None


def _check_file(path: Path) -> None:
    """A runtime works with any driver of its major version, and with newer ones."""
    try:
        runtime, driver = runtime_version(path), driver_version()
    except OSError as error:
        raise Unavailable(str(error)) from error
    if runtime is not None and driver is not None and driver // 1000 < runtime // 1000:
        raise Unavailable(
            f"the driver supports CUDA {_words(driver)}, and {path} was built with "
            f"{_words(runtime)}: update the driver, or install an nvcc of CUDA {driver // 1000}"
        )


def _words(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _check() -> None:
    check_abi()
    if torch.version.cuda is None:
        raise Unavailable("this torch is built without CUDA")
    if not capabilities():
        raise Unavailable("no GPU that torch can use")
    major, minor = capabilities()[-1]
    if (major, minor) < OLDEST:
        raise Unavailable(f"sm_{major}{minor}: kernels begin with sm_80")


def _archs() -> tuple[str, ...]:
    # a GPU that is too old for kernels runs the reference, whatever the other GPUs are
    archs = [nvcc.arch_of(capability) for capability in capabilities() if capability >= OLDEST]
    return nvcc.wanted_archs(archs or nvcc.ARCHS)


def _compiler() -> str:
    compiler, reason = nvcc.find(cpp_extension.cuda_home()), cpp_extension.unsupported_reason()
    driver = driver_version()
    if driver is not None and driver // 1000 < (major := nvcc.major_version(compiler)):
        raise Unavailable(
            f"the driver supports CUDA {_words(driver)}, and {compiler} is of CUDA {major}: update "
            f"the driver, or set CUDA_HOME to a CUDA {driver // 1000}"
        )
    if reason is None:
        return f"torch.utils.cpp_extension with ninja and {compiler}"
    return f"{compiler}, not torch.utils.cpp_extension: {reason}"


def compile_library(work: Path, archs: tuple[str, ...], ptx: bool) -> Path:
    """Compile with ``torch.utils.cpp_extension``, or with nvcc alone where that is not possible.

    Returns:
        The library, in ``work``.

    Raises:
        Unavailable: there is no nvcc, or it failed.
    """
    compiler, sources = nvcc.find(cpp_extension.cuda_home()), folder("cuda_ext")
    if cpp_extension.unsupported_reason() is None:
        try:
            return cpp_extension.compile_library(sources, work, archs, ptx)
        except Unavailable as error:
            _log.warning("dtq: %s; nvcc is called directly", error)
    return nvcc.build(compiler, sources, archs, ptx).run(Path(torch.__file__).parent, work)


def build_ahead() -> Path:
    """Compile for every architecture, to the place next to the package: ``make kernels``.

    Raises:
        OSError: there is no nvcc, or it failed.
    """
    compile_all = partial(compile_library, archs=nvcc.wanted_archs(), ptx=True)
    return dataclasses.replace(CUDA, compile=compile_all).build(CUDA.packaged())


def _prepare(library: ctypes.CDLL) -> None:
    library.dtq_cuda_archs.restype = library.dtq_cuda_gemm.restype = ctypes.c_char_p
    sizes = [ctypes.c_int64] * 3
    library.dtq_cuda_gemm.argtypes = [ctypes.c_int, ctypes.c_int, *sizes, ctypes.c_int]
    library.dtq_cuda_references.restype = ctypes.c_int64
    register_formats(library.dtq_cuda_format)


CUDA = Library(
    device="cuda",
    title="GPU",
    ops=(
        "quantize_rows",
        "binned_quantize_rows",
        "e4m3_quantize_rows",
        "e2m1_quantize_rows",
        "fp4_quantize_rows",
        "gelu_quantize_rows",
        "norm_quantize_rows",
        "transform_rows",
        "round_rows",
        "w8a8_linear",
        "w4a8_linear",
        "w3a8_linear",
        "lut4a8_linear",
        "fp4_linear",
        "w8a8_epilogue_linear",
        "w4a8_epilogue_linear",
        "dequantize",
        "weight_linear",
    ),
    key=lambda: nvcc.key(folder("cuda_ext")),
    compiler=_compiler,
    compile=lambda work: compile_library(work, _archs(), ptx=False),
    builds=lambda: "+".join(f"sm_{arch}" for arch in _archs()),
    check=_check,
    check_file=_check_file,
    prepare=_prepare,
    detail=lambda library: str(library.dtq_cuda_archs().decode()),
    compile_seconds=90,
)
