# SPDX-License-Identifier: Apache-2.0
"""The CUDA library by ``torch.utils.cpp_extension.load``, with the files and flags of ``nvcc.py``.

torch users expect this way of compiling at first use: ninja, ``MAX_JOBS``, ``CXX``,
``PYTORCH_NVCC``. It needs ninja and a torch with CUDA, whose libraries it links. Without them nvcc
is called directly. The linker drops what ``load`` links in addition to the stable ABI, so both ways
give the same library.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dtq.kernels.compile import nvcc
from dtq.kernels.compile.compiler import Unavailable, first_error

# `load` adds its own libraries after these; the linker takes them only where something needs them.
# cudart is linked as nvcc does it, so that the library needs no CUDA toolkit where it runs.
_LINK = (f"-Wl,{nvcc.LINKED}", "-lcudart_static", "-ldl", "-lrt", "-lpthread")


def cuda_home() -> str | None:
    """Where torch found the CUDA toolkit; None for a torch without CUDA."""
    try:
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:  # it needs setuptools, which an installed dtq does not
        return None
    return CUDA_HOME


def find_ninja() -> str | None:
    """Find ninja on the path, else next to this Python, where pip installs it."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def unsupported_reason() -> str | None:
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
    """Compile, link and load the CUDA library.

    Args:
        folder: the sources.
        work: the folder of the objects and the library.
        archs: architectures to make machine code for, as nvcc names them.
        ptx: whether to add PTX for later GPUs.

    Returns:
        The library, in ``work``.

    Raises:
        Unavailable: it failed; the message has the first error.
    """
    from torch.utils.cpp_extension import load

    with _on_path(find_ninja()):
        try:
            library: str = load(
                "dtq_cuda",
                [str(folder / source) for source in nvcc.SOURCES],
                extra_cflags=_escaped(nvcc.host_flags(archs, ptx)),
                extra_cuda_cflags=_escaped(nvcc.device_flags(archs, ptx)),
                extra_ldflags=list(_LINK),
                build_directory=str(work),
                with_cuda=True,
                is_python_module=False,
            )
        except RuntimeError as error:
            raise Unavailable(first_error("torch.utils.cpp_extension", str(error))) from error
    return Path(library)


def _escaped(flags: Sequence[str]) -> list[str]:
    """Flags as ``load`` writes them into a ninja file: escaped for ninja and for the shell."""
    return [shlex.quote(flag).replace("$", "$$") for flag in flags]


@contextmanager
def _on_path(program: str | None) -> Iterator[None]:
    """``load`` calls ninja by its name, so its folder has to be on the path."""
    before = os.environ.get("PATH", os.defpath)
    if program is not None and shutil.which("ninja") is None:
        os.environ["PATH"] = f"{before}{os.pathsep}{Path(program).parent}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
