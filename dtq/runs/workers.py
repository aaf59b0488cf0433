# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: rank and size, broadcast, barrier, heartbeats, sharding of the work.

Results travel through a folder (``tasks.py``, ``gather.py``). Between the processes there are only
heartbeats and small plain data, in the key-value store of ``torch.distributed``; no process group.

The waiting is our own because two promises are beyond the barriers of accelerate and of gloo
(``monitored_barrier``), which wait for one fixed time: a process whose heartbeat continues is
waited for without limit, since one task may take hours, and a process that died, hangs or lost its
network stops the others, within seconds on one machine.
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

import psutil
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from dtq.errors import InputError, WorkerError

_TIMEOUT = 600.0  # seconds without a heartbeat
_HEARTBEAT = 5.0  # seconds between two heartbeats


class KeyValueStore:
    """Broadcasts through a TCP store, with a heartbeat of every process in a thread of its own.

    Args:
        rank: of this process.
        size: number of processes.
        timeout: seconds without a heartbeat after which a process counts as dead.

    Raises:
        KeyError, ValueError, RuntimeError: a variable of the launcher is missing or wrong, or no
            store answers.
        WorkerError: not all processes came in time.
    """

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._interval = min(_HEARTBEAT, timeout / 4)
        self._rounds = 0
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store
        self._store = self._connect(serve=rank == 0 and not agent)
        # a second connection, because each serves one thread at a time
        self._beat = threading.Thread(
            target=self._send_heartbeats, args=(self._connect(serve=False),), daemon=True
        )
        self._stop = threading.Event()
        self._beat.start()
        atexit.register(self._leave)
        self._last_seen = {r: (b"", time.monotonic()) for r in range(size) if r != rank}
        self._wait([f"alive/{r}" for r in range(size)])

    def _connect(self, serve: bool) -> PrefixStore:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=serve,
            timeout=timedelta(seconds=self.timeout), wait_for_workers=False,
        )  # fmt: skip
        # a launcher that restarts the processes keeps its store
        return PrefixStore(f"dtq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def broadcast(self, value: Any) -> Any:
        """The value of process 0, in every process, when all have arrived.

        Raises:
            RuntimeError: the store is gone.
            WorkerError: a process died.
        """
        name, self._rounds = str(self._rounds), self._rounds + 1
        if self.rank == 0:
            self._store.set(f"{name}/value", json.dumps(value))
        self._wait_for_all(f"{name}/arrived")
        result = json.loads(self._store.get(f"{name}/value"))
        # process 0 leaves last: the store may end with it
        self._wait_for_all(f"{name}/left", wait=self.rank == 0)
        return result

    def _wait_for_all(self, name: str, wait: bool = True) -> None:
        self._store.set(f"{name}/{self.rank}", "")
        if wait:
            self._wait([f"{name}/{r}" for r in range(self.size)])

    def _wait(self, keys: list[str]) -> None:
        pause, checked = 0.001, time.monotonic()
        while not self._store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
            if time.monotonic() - checked > self._interval:
                checked = time.monotonic()
                problem = self._dead_process()
                if problem and not self._store.check(keys):  # a process that is done may end
                    raise WorkerError(problem)

    def _dead_process(self) -> str:
        """Which other process ended, or sends no heartbeat for too long; "" if none."""
        for rank, (before, since) in self._last_seen.items():
            key = f"alive/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b"{}"
            process = json.loads(beat)
            if process.get("machine") == _machine() and not _is_alive(process):
                return f"process {rank} of {self.size} ended before the others"
            if beat != before:
                self._last_seen[rank] = beat, time.monotonic()
            elif (silent := time.monotonic() - since) > self.timeout:
                return f"no heartbeat from process {rank} of {self.size} for {silent:.0f} s"
        return ""

    def _send_heartbeats(self, store: PrefixStore) -> None:
        identity = {
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "machine": _machine(),
        }
        with suppress(RuntimeError):  # the store is gone: processes that wait for it report that
            for count in itertools.count():
                store.set(f"alive/{self.rank}", json.dumps({**identity, "count": count}))
                if self._stop.wait(self._interval):
                    break

    def _leave(self) -> None:
        self._stop.set()
        self._beat.join(_HEARTBEAT)


@functools.cache
def _key_value_store(rank: int, size: int, timeout: float, process: int) -> KeyValueStore:
    """One for all commands of a process: the store keeps what earlier commands wrote."""
    return KeyValueStore(rank, size, timeout)


@functools.cache
def _machine() -> str:
    """Identity of this machine and, in a container, of its process table."""
    boot, table = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    ids = [boot.read_text().strip(), os.readlink(table)] if boot.exists() else []
    return " ".join([socket.gethostname(), *ids])


def _is_alive(identity: Mapping[str, Any]) -> bool:
    """Whether a process of this machine runs; its start time tells it from one that reuses its pid."""
    try:
        process = psutil.Process(identity["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:  # ended, and its parent has not asked yet
            return False
        return abs(process.create_time() - identity["started"]) < 2.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


@dataclass(frozen=True)
class Workers:
    """This process among those of the run.

    Attributes:
        rank: number of this process; 0 prints, decides and writes the output.
        size: number of processes.
        store: connects them; None for a single process.
    """

    rank: int = 0
    size: int = 1
    store: KeyValueStore | None = field(default=None, repr=False, compare=False)

    @classmethod
    def join(cls) -> Workers:
        """The processes that ``torchrun``, or a launcher that sets its variables, started.

        ``DTQ_TIMEOUT`` is the number of seconds without a heartbeat after which a process counts as
        dead, 600 by default.

        Raises:
            InputError: a variable is missing, or is no number.
            WorkerError: not all processes came.
        """
        try:
            rank, size = (
                int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1"))
            )
            timeout = float(os.environ.get("DTQ_TIMEOUT", _TIMEOUT))
        except ValueError as error:
            raise InputError(f"RANK, WORLD_SIZE, DTQ_TIMEOUT: {error}") from error
        if size == 1:
            return cls()
        try:
            return cls(rank, size, _key_value_store(rank, size, timeout, os.getpid()))
        except KeyError as error:
            raise InputError(
                f"WORLD_SIZE is {size} and {error.args[0]} is not set: start the processes with "
                f"torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each"
            ) from error
        except (RuntimeError, WorkerError, ValueError) as error:
            raise WorkerError(
                f"distributed initialization failed for {size} processes: {error}"
            ) from error

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, decides and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here, for as long as their heartbeats continue.

        Raises:
            WorkerError: a process died.
        """
        self.broadcast(None)

    def broadcast(self, value: Any) -> Any:
        """The plain data of the main process, in every process, when all have arrived.

        Raises:
            WorkerError: a process died.
        """
        if self.store is None:
            return value
        try:
            return self.store.broadcast(value)
        except (RuntimeError, WorkerError) as error:
            reason = " ".join(str(error).split())
            raise WorkerError(
                f"process {self.rank} of {self.size}: another process died or does not answer "
                f"({reason}). Finished tasks are kept: the same command continues from there"
            ) from error

    def assign(self, costs: Mapping[str, float]) -> list[str]:
        """The tasks of this process, in the order given.

        The most expensive task first, each goes to the process with the lowest total so far. Every
        process computes the same assignment.

        Args:
            costs: relative cost by task.
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
        """Which of ``count`` samples this process makes: whole batches, round-robin.

        Args:
            count: number of samples.
            batch: samples per batch; a batch has the same samples as in a single process.

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
