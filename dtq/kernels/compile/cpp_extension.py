# SPDX-License-Identifier: Apache-2.0
"""The CUDA library by ``torch.utils.cpp_extension.load``, from the files and flags of ``nvcc.py``.

That is how torch users expect a library to be compiled at first use: ninja, ``MAX_JOBS``, ``CXX``,
``PYTORCH_NVCC``. It wants ninja, and a torch with CUDA whose libraries it links; where one is not
there, nvcc is called directly. What ``load`` links beside what the stable ABI needs is dropped by
the linker, so that both ways give the same library.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dtq.kernels.compile import compiler, nvcc


def cuda_home() -> str | None:
    """Where torch found the CUDA toolkit; None for a torch without CUDA."""
    try:
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:  # it needs setuptools, which an installed dtq does not
        return None
    return CUDA_HOME


def find_ninja() -> str | None:
    """On the path, else where pip puts it: beside this Python, whose folder may not be on it."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def refusal() -> str | None:
    """Why ``load`` cannot compile here; None where it can."""
    home = cuda_home()
    if home is None:
        return "it knows no CUDA toolkit"
    if "PYTORCH_NVCC" not in os.environ and not (Path(home) / "bin" / "nvcc").exists():
        return f"no nvcc in {home}"
    if find_ninja() is None:
        return "it needs ninja: pip install ninja"
    return None


def compile_library(folder: Path, work: Path, archs: Sequence[str], ptx: bool) -> Path:
    """Compile, link and load; arguments as of :func:`nvcc.compile_library`.

    Raises:
        OSError: it failed; the first error is in the message.
    """
    from torch.utils.cpp_extension import load

    # what `load` adds after these is linked only where something still needs it
    links = [f"-Wl,{nvcc.LINKED}", *_STATIC_CUDART]
    with _on_path(find_ninja()):
        try:
            made: str = load(
                "dtq_cuda",
                [str(folder / unit) for unit in nvcc.UNITS],
                extra_cflags=_escaped(nvcc.host_flags(archs, ptx)),
                extra_cuda_cflags=_escaped(nvcc.device_flags(archs, ptx)),
                extra_ldflags=links,
                build_directory=str(work),
                with_cuda=True,
                is_python_module=False,
            )
        except RuntimeError as error:
            raise OSError(compiler.first_error("torch.utils.cpp_extension", str(error))) from error
    return Path(made)


_STATIC_CUDART = ("-lcudart_static", "-ldl", "-lrt", "-lpthread")
"""As nvcc links it, so that the library asks for no toolkit where it runs."""


def _escaped(flags: Sequence[str]) -> list[str]:
    """As ``load`` writes flags into a ninja file: for ninja, and for the shell that it calls."""
    return [shlex.quote(flag).replace("$", "$$") for flag in flags]


@contextmanager
def _on_path(program: str | None) -> Iterator[None]:
    """``load`` calls ninja by its name."""
    before = os.environ.get("PATH", os.defpath)
    if program is not None and shutil.which("ninja") is None:
        os.environ["PATH"] = f"{before}{os.pathsep}{Path(program).parent}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
