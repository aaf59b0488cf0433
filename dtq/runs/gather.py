# SPDX-License-Identifier: Apache-2.0
"""Gather tensors and plain data of every process in the main one, through files that all see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dtq.errors import InputError, WorkerError
from dtq.io.atomic import make_directory
from dtq.runs.tasks import Result, read_result, write_result
from dtq.runs.workers import Workers


def gather(
    workers: Workers, folder: Path | None, name: str, tensors: Mapping[str, Tensor], data: Any
) -> list[Result] | None:
    """Tensors and data of every process.

    Args:
        workers: the processes.
        folder: a folder that all of them see; a single process needs none.
        name: of what is gathered; the temporary files are named after it.
        tensors: of this process.
        data: of this process, plain data that JSON can hold.

    Returns:
        One entry per process in order of ranks; None in all but the main process.

    Raises:
        InputError: there are several processes and no folder.
        WorkerError: another process died, or does not see the folder.
    """
    if workers.size == 1:
        return [(dict(tensors), data)]
    if folder is None:
        raise InputError(f"{workers.size} processes need a folder that all of them see")
    make_directory(folder)
    paths = [folder / f"{name}-{rank}.safetensors" for rank in range(workers.size)]
    write_result(paths[workers.rank], tensors, data)
    workers.barrier()
    if not workers.is_main:
        return None
    results = []
    for path in paths:
        if not path.is_file():
            raise WorkerError(f"{path} is not there: do all processes see the folder {folder}?")
        results.append(read_result(path))
        path.unlink()
    return results


def check_ids(ids: Sequence[str], count: int) -> None:
    """Check that every sample was made once.

    Args:
        ids: ids of the samples that were made, ``0000`` and up.
        count: how many there should be.

    Raises:
        WorkerError: names the samples that are missing or were made twice.
    """
    times = Counter(ids)
    wrong = [x for x in (f"{i:04d}" for i in range(count)) if times[x] != 1]
    if wrong or len(times) != count:
        names = ", ".join(wrong[:8]) or "ids beyond the last"
        raise WorkerError(f"missing or duplicated samples of {count}: {names}")
