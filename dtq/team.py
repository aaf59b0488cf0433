# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: who is who, who does what, and waiting for each other.

Results travel through a folder (``work.py``, ``evaluate/exchange.py``), so a process group carries
nothing but "I am here" and small plain data: gloo serves on every machine, also where models are on
GPUs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dtq.errors import InputError, TeamError

_PATIENCE = 3600.0  # seconds; the others may have a longer part of the calibration


@dataclass(frozen=True)
class Team:
    """This process among those of the run.

    Attributes:
        rank: number of this process; 0 prints, decides and writes the checkpoint.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Team:
        """The processes that ``torchrun`` (or a launcher that sets its variables) started.

        ``DTQ_TIMEOUT`` is how many seconds one waits for another, 3600 by default.

        Raises:
            InputError: the variables or the time-out are no numbers.
            TeamError: not all of them came.
        """
        try:
            size = int(os.environ.get("WORLD_SIZE", "1"))
            patience = timedelta(seconds=float(os.environ.get("DTQ_TIMEOUT", _PATIENCE)))
        except ValueError as error:
            raise InputError(f"WORLD_SIZE, DTQ_TIMEOUT: {error}") from error
        if size == 1:
            return cls()
        if not dist.is_initialized():
            try:
                dist.init_process_group("gloo", timeout=patience)
            except (RuntimeError, ValueError) as error:
                raise TeamError(f"the {size} processes did not find each other: {error}") from error
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Wait until every process is here.

        Raises:
            TeamError: one died, or did not come in time.
        """
        if self.size == 1:
            return
        try:
            dist.monitored_barrier()
        except RuntimeError as error:
            raise self._lost(error) from error

    def tell(self, value: Any) -> Any:
        """What rank 0 has, plain data, for everyone.

        Raises:
            TeamError: a process died, or did not come in time.
        """
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.leads else b""
        try:
            length = torch.tensor([len(text)])
            dist.broadcast(length, 0)
            data = torch.zeros(int(length), dtype=torch.uint8)
            if self.leads:
                data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            dist.broadcast(data, 0)
        except RuntimeError as error:
            raise self._lost(error) from error
        return json.loads(bytes(data.tolist()))

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """What this process does of what is to be done, in the order given.

        The dearest first, each to whoever has least to do; every process works out the same.
        """
        loads = [0.0] * self.size
        mine = set()
        for name in sorted(costs, key=lambda n: (-costs[n], n)):
            rank = loads.index(min(loads))
            loads[rank] += costs[name]
            if rank == self.rank:
                mine.add(name)
        return [name for name in costs if name in mine]

    def deal(self, count: int, batch: int) -> list[int]:
        """Which of ``count`` places are for this process: whole batches in turn.

        Raises:
            InputError: there are fewer batches than processes.
        """
        if -(-count // batch) < self.size:
            raise InputError(
                f"{count} in batches of {batch} are too few for {self.size} processes; ask for "
                f"more, or for smaller batches"
            )
        return [i for i in range(count) if i // batch % self.size == self.rank]

    def _lost(self, error: RuntimeError) -> TeamError:
        reason = " ".join(str(error).split())
        return TeamError(
            f"process {self.rank} of {self.size}: another process died or does not answer "
            f"({reason}). What is finished is kept: the same command goes on from there"
        )


ALONE = Team()
