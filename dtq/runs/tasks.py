# SPDX-License-Identifier: Apache-2.0
"""Units of work: what a run goes on from after a crash, and what its processes share.

A unit is a deterministic piece of work with a name: a part of the calibration, the linears of one
input, one measured alternative. Its result is tensors and plain data in one safetensors file, which
is whole or absent. One process computes it; whoever needs it reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtq.errors import CheckpointError
from dtq.io.atomic import atomic_replace
from dtq.runs.workers import SINGLE_PROCESS, Workers

Result = tuple[dict[str, Tensor], Any]
"""Tensors by name, and plain data."""


class TaskStore:
    """Finished units, in a folder or (without one) in memory.

    Args:
        folder: where units are kept; None keeps them in memory, for this process alone.
        team: the processes that share the work; they need a folder that all of them see.
    """

    def __init__(self, folder: Path | None = None, workers: Workers = SINGLE_PROCESS) -> None:
        assert folder is not None or workers.size == 1
        self.folder, self.workers = folder, workers
        self._kept: dict[str, Result] = {}

    def namespace(self, name: str) -> TaskStore:
        """The work on one of several models."""
        return TaskStore(None if self.folder is None else self.folder / name, self.workers)

    def path(self, unit: str) -> Path | None:
        """The file of a unit, None in memory."""
        return None if self.folder is None else self.folder / f"{unit}.safetensors"

    def __contains__(self, unit: str) -> bool:
        path = self.path(unit)
        return unit in self._kept if path is None else path.exists()

    def assigned(self, costs: Mapping[str, float]) -> list[str]:
        """The units of this process that are not finished, in the order given."""
        open_ = self.workers.broadcast([unit for unit in costs if unit not in self])
        return self.workers.assign({unit: costs[unit] for unit in open_})

    def save(self, unit: str, tensors: Mapping[str, Tensor], data: Any = None) -> None:
        """Finish a unit."""
        path = self.path(unit)
        if path is None:
            self._kept[unit] = dict(tensors), data
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = _own(tensors)
        metadata = {"data": json.dumps(data)}
        atomic_replace(path, lambda draft: save_file(stored, draft, metadata))

    def load(self, unit: str) -> Result:
        """What was saved; tensors of a file are mapped and read when they are used.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.path(unit)
        if path is None:
            return self._kept[unit]
        try:
            with safe_open(path, framework="pt") as file:
                data = json.loads(file.metadata()["data"])
                return {key: file.get_tensor(key) for key in file.keys()}, data  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error}); delete it, and the same command makes it again"
            ) from error

    def get_or_compute(self, unit: str, compute: Callable[[], Result]) -> Result:
        """A unit of a stage that one process does alone: read it, or compute and keep it."""
        if unit not in self:
            self.save(unit, *compute())
        return self.load(unit)

    def barrier(self) -> None:
        """Wait until every process has finished its units."""
        self.workers.barrier()


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, on the CPU, and none sharing memory with another: safetensors refuses that."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        at = here.untyped_storage().data_ptr()
        owned[name] = here.clone() if at in seen else here
        seen.add(at)
    return owned
