# SPDX-License-Identifier: Apache-2.0
"""Memory of large models: pages of mapped weights, and memory that malloc keeps.

``from_pretrained`` maps safetensors files when nothing has to be cast: a weight is read from disk
when it is used and stays in memory until the kernel needs the room. :func:`paged_weights` releases
it as soon as its block has run, so that one block at a time is in RAM. Only the resident memory
changes: the next use reads the weight again.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

from torch import Tensor, nn

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt
_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: drops clean file pages, never data
_DONTNEED = 4  # MADV_DONTNEED: drops the pages of this process, not those of the file's cache
_SUFFIX, _HUB_CACHE = ".safetensors", "/blobs/"  # files in the Hub's cache are named by a hash


def tune_malloc() -> None:
    """From now on malloc keeps the memory that this process frees, for later allocations.

    By default every large tensor is a mapping of its own, whose pages the kernel has to find and
    clear each time: a fifth of the time of quantizing large layers (docs/large.md). Without glibc
    nothing happens.

    A freed block is reused for the same size after at most eight allocations: until then the
    thread cache of malloc holds the few bytes next to a block that torch's alignment leaves over,
    and the block alone is too small for the next request.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


class _Mallinfo(ctypes.Structure):
    """The result of glibc's mallinfo2."""

    _fields_ = [
        ("others", ctypes.c_size_t * 8),
        ("free", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


def trim_malloc(beyond: int = 0) -> None:
    """Return the memory that malloc keeps to the system: it fragments as sizes change.

    Args:
        beyond: bytes; nothing happens while malloc keeps less.
    """
    trim, info = _of_glibc("malloc_trim"), _of_glibc("mallinfo2")
    if trim is None:
        return
    if info is not None:  # glibc 2.33
        info.restype = _Mallinfo  # type: ignore[attr-defined]
        if info().free <= beyond:  # type: ignore[attr-defined]
            return
    trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


@contextmanager
def paged_weights(*models: nn.Module) -> Iterator[None]:
    """Release the mapped weights of each block as soon as it has run.

    Blocks are the elements of module lists; other weights stay. Models whose weights are not
    mapped, and systems without ``MADV_PAGEOUT``, run as usual.
    """
    with ExitStack() as hooks:
        for model in models:
            mapped = Mapped()
            if not any(mapped.holds(p) for p in model.parameters()):
                continue
            for blocks in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
                for block in blocks.children():  # entries may be None
                    hooks.enter_context(block.register_forward_hook(partial(_release, mapped)))
        yield


class Mapped:
    """The address ranges that this process maps from safetensors files at present."""

    def __init__(self) -> None:
        ranges = []
        maps = Path("/proc/self/maps")
        if sys.platform == "linux" and maps.exists():
            for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.endswith(_SUFFIX) or _HUB_CACHE in line:
                    first, last = line.split(" ", 1)[0].split("-")
                    ranges.append((int(first, 16), int(last, 16)))
        self.ranges = sorted(ranges)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a mapped file."""
        if tensor.device.type != "cpu":
            return False
        address = tensor.data_ptr()
        index = bisect.bisect_right(self.ranges, (address, sys.maxsize)) - 1
        return index >= 0 and self.ranges[index][0] <= address < self.ranges[index][1]

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Release the pages that hold one mapped tensor and nothing else.

        The kernel reads them from disk at the next use.
        """
        self._advise(tensors, _PAGEOUT)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Release pages as :meth:`release` does, of tensors that are not used any more.

        The kernel may keep them for other processes. Changes that were made to the tensors are
        lost.
        """
        self._advise(tensors, _DONTNEED)

    def _advise(self, tensors: Iterable[Tensor], advice: int) -> None:
        page = mmap.PAGESIZE
        for tensor in filter(self.holds, tensors):
            start = -(-tensor.data_ptr() // page) * page
            end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
            if end > start:
                # only advice: on a kernel that does not know it the pages stay
                _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _release(mapped: Mapped, module: nn.Module, args: object, output: object) -> None:
    mapped.release(module.parameters())
