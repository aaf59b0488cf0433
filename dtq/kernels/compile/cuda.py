# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernels: when they can be used, and how they are compiled at first use.

``torch.utils.cpp_extension`` compiles (``extension.py``), for the GPUs of this machine only; where
it cannot, nvcc is called directly, as for a wheel. Files and flags are those of ``nvcc.py``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import logging
from pathlib import Path

import torch

from dtq.io.package_data import folder
from dtq.kernels import ops_fp4, ops_gemm, ops_quantize
from dtq.kernels.compile import cpp_extension, nvcc
from dtq.kernels.compile.format_codes import register_formats
from dtq.kernels.compile.library import Library, Unavailable, needs_abi

_log = logging.getLogger(__name__)

OLDEST = (8, 0)
"""Smallest capability with kernels: the int8 matrix instructions of Ampere."""


def capabilities() -> list[tuple[int, int]]:
    """Of the GPUs that torch can use."""
    if not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})


def _usable() -> None:
    needs_abi()
    if torch.version.cuda is None:
        raise Unavailable("this torch is built without CUDA")
    found = capabilities()
    if not found:
        raise Unavailable("no GPU that torch can use")
    if found[-1] < OLDEST:
        raise Unavailable(f"sm_{found[-1][0]}{found[-1][1]}: kernels begin with sm_80")


def _builds() -> str:
    return "+".join(f"sm_{arch}" for arch in _archs())


def _archs() -> tuple[str, ...]:
    # an older GPU beside one with kernels runs the reference
    found = [nvcc.arch_of(capability) for capability in capabilities() if capability >= OLDEST]
    return nvcc.wanted_archs(found or nvcc.ARCHS)


@functools.cache
def _key() -> str:
    return nvcc.key(folder("cuda_ext"))


def _nvcc() -> str:
    found = nvcc.find_nvcc(cpp_extension.cuda_home())
    if found is None:
        raise Unavailable("no nvcc on the path or in CUDA_HOME")
    return found


def _compiler() -> str:
    found, refused = _nvcc(), cpp_extension.refusal()
    if refused is None:
        return f"torch.utils.cpp_extension with ninja and {found}"
    return f"{found}, not torch.utils.cpp_extension: {refused}"


def _compile(work: Path) -> Path:
    return _made(work, _archs(), ptx=False)


def ahead() -> Path:
    """Compile for every architecture, to the place beside the package: ``make kernels``.

    Raises:
        OSError: there is no nvcc, or it failed.
    """

    def every(work: Path) -> Path:
        return _made(work, nvcc.wanted_archs(), ptx=True)

    return dataclasses.replace(CUDA, compile=every).build(CUDA.beside())


def _made(work: Path, archs: tuple[str, ...], ptx: bool) -> Path:
    compiler, sources = _nvcc(), folder("cuda_ext")
    if cpp_extension.refusal() is None:
        try:
            return cpp_extension.compile_library(sources, work, archs, ptx)
        except OSError as error:
            _log.warning("dtq: %s; nvcc is called directly", error)
    try:
        home = Path(torch.__file__).parent
        return nvcc.compile_library(compiler, sources, home, work, archs, ptx)
    except OSError as error:
        raise Unavailable(str(error)) from error


def _prepare(library: ctypes.CDLL) -> None:
    library.dtq_cuda_archs.restype = library.dtq_cuda_gemm.restype = ctypes.c_char_p
    sizes = ctypes.c_int64
    library.dtq_cuda_gemm.argtypes = [ctypes.c_int, ctypes.c_int, sizes, sizes, sizes, ctypes.c_int]
    library.dtq_cuda_references.restype = ctypes.c_int64
    register_formats(library.dtq_cuda_format)


CUDA = Library(
    device="cuda",
    title="GPU",
    ops=(
        "quantize_rows",
        *(
            schema.split("(")[0]
            for schema, _, _ in (*ops_quantize.OPS, *ops_gemm.OPS, *ops_fp4.OPS)
        ),
        "transform_rows",
        "round_rows",
        "w8a8_linear",
        "w4a8_linear",
        "w3a8_linear",
        "dequantize",
        "weight_linear",
    ),
    key=_key,
    compile=_compile,
    compiler=_compiler,
    builds=_builds,
    usable=_usable,
    prepare=_prepare,
    says=lambda library: str(library.dtq_cuda_archs().decode()),
    takes=90,
)
