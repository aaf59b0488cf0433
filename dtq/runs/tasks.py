# SPDX-License-Identifier: Apache-2.0
"""Tasks: where a run continues after a crash, and how its processes share the work.

A task is a deterministic computation with a name: the linears that share one input, one measured
candidate, one fine-tuned block. Its result is tensors and plain data in one safetensors file, which
is whole or absent. One process computes a task; every process that needs its result loads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtq.errors import CheckpointError
from dtq.io.atomic import atomic_save_tensors, make_directory
from dtq.runs.workers import SINGLE_PROCESS, Workers

Result = tuple[dict[str, Tensor], Any]
"""Tensors by name, and plain data."""


class TaskStore:
    """Results of finished tasks, in a folder or (without one) in memory.

    Args:
        folder: where results are stored; None keeps them in memory, for this process alone.
        workers: the processes that share the tasks; several need a folder that all of them see.
    """

    def __init__(self, folder: Path | None = None, workers: Workers = SINGLE_PROCESS) -> None:
        assert folder is not None or workers.size == 1
        self.folder, self.workers = folder, workers
        self._in_memory: dict[str, Result] = {}

    def namespace(self, name: str) -> TaskStore:
        """The tasks below a prefix: of one of several models, or of one stage."""
        return TaskStore(None if self.folder is None else self.folder / name, self.workers)

    def path(self, task: str) -> Path | None:
        """The file of a task's result, None in memory."""
        return None if self.folder is None else self.folder / f"{task}.safetensors"

    def __contains__(self, task: str) -> bool:
        path = self.path(task)
        return task in self._in_memory if path is None else path.exists()

    def assigned(self, costs: Mapping[str, float]) -> list[str]:
        """The unfinished tasks of this process, in the order given.

        Args:
            costs: relative cost by task. The order and the costs are the same in every process.
        """
        unfinished = self.workers.broadcast([task for task in costs if task not in self])
        return self.workers.assign({task: costs[task] for task in unfinished})

    def save(self, task: str, tensors: Mapping[str, Tensor], data: Any = None) -> None:
        """Store a result: tensors, and ``data`` that JSON can hold."""
        path = self.path(task)
        if path is None:
            self._in_memory[task] = dict(tensors), data
            return
        make_directory(path.parent)
        write_result(path, tensors, data)

    def load(self, task: str) -> Result:
        """A stored result; the tensors of a file are mapped, and read when they are used.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.path(task)
        return self._in_memory[task] if path is None else read_result(path)

    def get_or_compute(self, task: str, compute: Callable[[], Result]) -> Result:
        """The stored result, or that of ``compute``, stored; for tasks of a single process."""
        if task not in self:
            self.save(task, *compute())
        return self.load(task)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.workers.barrier()


def write_result(path: Path, tensors: Mapping[str, Tensor], data: Any) -> None:
    """Write tensors and plain data to a file that is whole or absent."""
    atomic_save_tensors(path, tensors, {"data": json.dumps(data)})


def read_result(path: Path) -> Result:
    """Inverse of :func:`write_result`; tensors are mapped.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            data = json.loads(file.metadata()["data"])
            return {key: file.get_tensor(key) for key in file.keys()}, data  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete it, and the same command computes it again"
        ) from error
