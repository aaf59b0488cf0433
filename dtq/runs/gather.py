# SPDX-License-Identifier: Apache-2.0
"""What processes tell the first one: tensors and plain data, in files that all of them see."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtq.errors import InputError, WorkerError
from dtq.io.atomic import atomic_replace, make_directory
from dtq.runs.workers import Workers


def gather(
    workers: Workers, folder: Path | None, name: str, tensors: Mapping[str, Tensor], plain: Any
) -> list[tuple[dict[str, Tensor], Any]] | None:
    """What every process has, in order of ranks; None for all but the first process.

    Args:
        team: the processes.
        folder: that all of them see; one process needs none.
        name: of what is gathered.
        tensors: of this process.
        plain: of this process, plain data.

    Raises:
        InputError: several processes, and no folder.
        TeamError: another process died, or does not see the folder.
    """
    if workers.size == 1:
        return [(dict(tensors), plain)]
    if folder is None:
        raise InputError(f"{workers.size} processes need a folder that all of them see")
    make_directory(folder)
    held = {key: tensor.contiguous() for key, tensor in tensors.items()}
    about = {"plain": json.dumps(plain)}
    mine = folder / f"{name}-{workers.rank}.safetensors"
    atomic_replace(mine, lambda draft: save_file(held, draft, about))
    workers.barrier()
    if not workers.is_main:
        return None
    found = []
    for rank in range(workers.size):
        path = folder / f"{name}-{rank}.safetensors"
        if not path.is_file():
            raise WorkerError(f"{path} is not there: do all processes see the folder {folder}?")
        with safe_open(path, "pt") as file:
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no iterator
            found.append((held, json.loads(file.metadata()["plain"])))
        path.unlink()
    return found


def check_ids(ids: Sequence[str], count: int) -> None:
    """Ask that every sample is there once.

    Raises:
        TeamError: names those that are not.
    """
    times = Counter(ids)
    wrong = [x for x in (f"{i:04d}" for i in range(count)) if times[x] != 1]
    if wrong or len(times) != count:
        raise WorkerError(
            f"missing or duplicated samples of {count}: {', '.join(wrong[:8]) or 'unknown names'}"
        )
