# SPDX-License-Identifier: Apache-2.0
"""What this machine does a second, each measured in a moment: forecasts are made of it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

_TRIED = 2**28  # bytes whose reading is timed


def multiply_rate(dtype: torch.dtype) -> float:
    """Floating point operations per second of a product on this machine."""
    a = torch.randn(768, 768).to(dtype)
    return 2 * 768**3 / _fastest(lambda: a @ a)


def touch() -> float:
    """Seconds of a pass over a tensor, by element."""
    a = torch.randn(512, 2048)
    return _fastest(lambda: a.abs().amax(0)) / a.numel()


def reading_time(folder: Path, component: str) -> float:
    """Seconds to read the shards of a model from disk, by what the first of them takes.

    0 where there are none: a hub id, or a model that is not a folder.
    """
    places = [folder / component, folder]
    shards = next((found for p in places if (found := sorted(p.glob("*.safetensors")))), [])
    size = sum(shard.stat().st_size for shard in shards)
    return size / read_rate(shards[0]) if size else 0.0


def read_rate(path: Path) -> float:
    """Bytes a second, from the disk and not from memory where the system can be asked to forget."""
    with path.open("rb", buffering=0) as file:
        length = min(path.stat().st_size, _TRIED)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, length, os.POSIX_FADV_DONTNEED)
        started, left = time.perf_counter(), length
        while left > 0 and (chunk := file.read(2**24)):
            left -= len(chunk)
        return length / max(time.perf_counter() - started, 1e-9)


def _fastest(work: Callable[[], object]) -> float:
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
