# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: who is who, who does what, and waiting for each other.

Results travel through a folder (``work.py``, ``evaluate/exchange.py``). The processes tell each
other nothing but "I am here" and small plain data, through the store of ``torch.distributed``.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from dtq.errors import InputError, WorkerError
from dtq.io.run_lock import is_alive, process_identity

_TIMEOUT = 600.0  # seconds without a sign of life
_HEARTBEAT = 5.0  # seconds between two of them


class KeyValueStore:
    """Where processes leave what they say, and a sign of life every few seconds.

    Whoever lives is waited for, for days if need be; whoever does not stops the others.

    Args:
        rank, size: of this process, of all.
        patience: seconds without a sign of life after which a process counts as dead.

    Raises:
        KeyError, ValueError, RuntimeError: the launcher's variables are wrong, or nobody answers.
        TeamError: not all processes came in time.
    """

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # a launcher that starts the processes again keeps its store
        name = f"dtq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

        def connected(serves: bool) -> PrefixStore:
            wait = timedelta(seconds=timeout)
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=serves, timeout=wait, wait_for_workers=False
            )
            return PrefixStore(name, store)

        self._store, self._rounds = connected(rank == 0 and not launcher), 0
        self._stop = threading.Event()
        line = connected(False)  # of its own: a connection serves one thread at a time
        self._beat = threading.Thread(target=self._send_heartbeats, args=(line,), daemon=True)
        self._beat.start()
        atexit.register(self._leave)
        self._seen = {r: (b"", time.monotonic()) for r in range(size) if r != rank}
        self._await([f"alive/{r}" for r in range(size)])

    def broadcast(self, value: Any) -> Any:
        """What process 0 has, for everyone; returns when everyone is here.

        Raises:
            RuntimeError: the store is gone.
            TeamError: a process died.
        """
        name, self._rounds = str(self._rounds), self._rounds + 1
        if self.rank == 0:
            self._store.set(f"{name}/said", json.dumps(value))
        self._store.set(f"{name}/here/{self.rank}", "")
        self._await([f"{name}/here/{r}" for r in range(self.size)])
        said = json.loads(self._store.get(f"{name}/said"))
        self._store.set(f"{name}/left/{self.rank}", "")
        if self.rank == 0:  # its end may be the end of the store
            self._await([f"{name}/left/{r}" for r in range(self.size)])
        return said

    def _await(self, keys: list[str]) -> None:
        pause, looked = 0.001, time.monotonic()
        while not self._store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
            if time.monotonic() - looked > min(_HEARTBEAT, self.timeout / 4):
                looked = time.monotonic()
                why = self._missing()
                if why and not self._store.check(keys):  # who is done may go
                    raise WorkerError(why)

    def _missing(self) -> str:
        """Which other process is gone or silent for too long, "" if none."""
        for rank, (before, when) in self._seen.items():
            key = f"alive/{rank}"
            sign = self._store.get(key) if self._store.check([key]) else b"{}"
            who = json.loads(sign)
            if who.get("home") == _machine() and not is_alive(who):
                return f"process {rank} of {self.size} ended before the others"
            if sign != before:
                self._seen[rank] = sign, time.monotonic()
            elif (silent := time.monotonic() - when) > self.timeout:
                return f"no sign of life from process {rank} of {self.size} for {silent:.0f} s"
        return ""

    def _send_heartbeats(self, store: PrefixStore) -> None:
        with suppress(RuntimeError):  # the store is gone: whoever waits for it says so
            for count in itertools.count():
                store.set(
                    f"alive/{self.rank}",
                    json.dumps({**process_identity(), "home": _machine(), "count": count}),
                )
                if self._stop.wait(min(_HEARTBEAT, self.timeout / 4)):
                    break

    def _leave(self) -> None:
        self._stop.set()
        self._beat.join(_HEARTBEAT)


@functools.cache
def _key_value_store(rank: int, size: int, patience: float, process: int) -> KeyValueStore:
    """One for all commands of a process: what was said stays on the board."""
    return KeyValueStore(rank, size, patience)


@functools.cache
def _machine() -> str:
    """This machine and, in a container, its table of processes."""
    boot, table = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    where = [boot.read_text().strip(), os.readlink(table)] if boot.exists() else []
    return " ".join([socket.gethostname(), *where])


@dataclass(frozen=True)
class Workers:
    """This process among those of the run.

    Attributes:
        rank: number of this process; 0 prints, decides and writes the checkpoint.
        size: how many there are.
        board: how they talk; None of one process.
    """

    rank: int = 0
    size: int = 1
    store: KeyValueStore | None = field(default=None, repr=False, compare=False)

    @classmethod
    def join(cls) -> Workers:
        """The processes that ``torchrun`` (or a launcher that sets its variables) started.

        ``DTQ_TIMEOUT`` is after how many seconds without a sign of life a process counts as dead,
        600 by default.

        Raises:
            InputError: a variable is missing, or no number.
            TeamError: not all of them came.
        """
        try:
            rank, size = (
                int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1"))
            )
            patience = float(os.environ.get("DTQ_TIMEOUT", _TIMEOUT))
        except ValueError as error:
            raise InputError(f"RANK, WORLD_SIZE, DTQ_TIMEOUT: {error}") from error
        if size == 1:
            return cls()
        try:
            return cls(rank, size, _key_value_store(rank, size, patience, os.getpid()))
        except KeyError as error:
            raise InputError(
                f"WORLD_SIZE is {size} and {error.args[0]} is not set: start the processes with "
                f"torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each"
            ) from error
        except (RuntimeError, WorkerError, ValueError) as error:
            raise WorkerError(f"the {size} processes did not find each other: {error}") from error

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here.

        Raises:
            TeamError: one died.
        """
        self.broadcast(None)

    def broadcast(self, value: Any) -> Any:
        """What rank 0 has, plain data, for everyone, when everyone is here.

        Raises:
            TeamError: a process died.
        """
        if self.store is None:
            return value
        try:
            return self.store.broadcast(value)
        except (RuntimeError, WorkerError) as error:
            reason = " ".join(str(error).split())
            raise WorkerError(
                f"process {self.rank} of {self.size}: another process died or does not answer "
                f"({reason}). What is finished is kept: the same command goes on from there"
            ) from error

    def assign(self, costs: Mapping[str, float]) -> list[str]:
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

    def shard(self, count: int, batch: int) -> list[int]:
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


SINGLE_PROCESS = Workers()
