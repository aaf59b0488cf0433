# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: rank, sharding of work, broadcast and barrier.

Results travel through a folder (``tasks.py``, ``gather.py``). Over the network the processes only
exchange heartbeats and small plain data, through the store of ``torch.distributed``.

Neither gloo's ``monitored_barrier`` nor accelerate keeps the two promises that the tests hold: a
process whose heartbeat continues is waited for without a timeout (one task may take a day), and a
process that died on this machine is noticed within seconds.
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
    """A ``TCPStore`` with heartbeats.

    Args:
        rank: of this process.
        size: number of processes.
        timeout: seconds without a heartbeat after which a process counts as dead.

    Raises:
        KeyError, ValueError, RuntimeError: the launcher's variables are wrong, or nothing answers.
        WorkerError: not all processes connected in time.
    """

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._store, self._rounds = self._connect(rank == 0 and not launcher), 0
        self._stop = threading.Event()
        # a connection serves one thread at a time
        heartbeats = threading.Thread(
            target=self._send_heartbeats, args=(self._connect(False),), daemon=True
        )
        heartbeats.start()
        atexit.register(self._leave, heartbeats)
        self._last = {r: (b"", time.monotonic()) for r in range(size) if r != rank}
        self._wait_for([f"heartbeat/{r}" for r in range(size)])

    def _leave(self, heartbeats: threading.Thread) -> None:
        self._stop.set()
        heartbeats.join(_HEARTBEAT)

    def _connect(self, is_server: bool) -> PrefixStore:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=is_server,
            timeout=timedelta(seconds=self.timeout),
            wait_for_workers=False,
        )
        # a launcher that restarts the processes keeps its store
        return PrefixStore(f"dtq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def broadcast(self, value: Any) -> Any:
        """The value of process 0, for every process; returns when every process has called it.

        Raises:
            RuntimeError: the store is gone.
            WorkerError: a process died.
        """
        name, self._rounds = str(self._rounds), self._rounds + 1
        if self.rank == 0:
            self._store.set(f"{name}/value", json.dumps(value))
        self._store.set(f"{name}/arrived/{self.rank}", "")
        self._wait_for([f"{name}/arrived/{r}" for r in range(self.size)])
        received = json.loads(self._store.get(f"{name}/value"))
        self._store.set(f"{name}/left/{self.rank}", "")
        if self.rank == 0:  # when this process ends, the store may end with it
            self._wait_for([f"{name}/left/{r}" for r in range(self.size)])
        return received

    def _wait_for(self, keys: list[str]) -> None:
        pause, checked = 0.001, time.monotonic()
        while not self._store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
            if time.monotonic() - checked > min(_HEARTBEAT, self.timeout / 4):
                checked = time.monotonic()
                reason = self._dead_process()
                if reason and not self._store.check(keys):  # a process may leave when it is done
                    raise WorkerError(reason)

    def _dead_process(self) -> str:
        """Why another process counts as dead, "" if none does."""
        for rank, (before, when) in self._last.items():
            key = f"heartbeat/{rank}"
            heartbeat = self._store.get(key) if self._store.check([key]) else b"{}"
            sender = json.loads(heartbeat)
            if sender.get("machine") == _machine() and not _is_alive(sender):
                return f"process {rank} of {self.size} ended before the others"
            if heartbeat != before:
                self._last[rank] = heartbeat, time.monotonic()
            elif (silent := time.monotonic() - when) > self.timeout:
                return f"no heartbeat from process {rank} of {self.size} for {silent:.0f} s"
        return ""

    def _send_heartbeats(self, store: PrefixStore) -> None:
        sender = {"pid": os.getpid(), "started": psutil.Process().create_time()}
        with suppress(RuntimeError):  # the store is gone: a process that waits reports it
            for count in itertools.count():
                heartbeat = {**sender, "machine": _machine(), "count": count}
                store.set(f"heartbeat/{self.rank}", json.dumps(heartbeat))
                if self._stop.wait(min(_HEARTBEAT, self.timeout / 4)):
                    break


@functools.cache
def _key_value_store(rank: int, size: int, timeout: float, process: int) -> KeyValueStore:
    """One for all commands of a process: values stay in the store."""
    return KeyValueStore(rank, size, timeout)


@functools.cache
def _machine() -> str:
    """This machine and, in a container, its table of processes."""
    boot, table = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    where = [boot.read_text().strip(), os.readlink(table)] if boot.exists() else []
    return " ".join([socket.gethostname(), *where])


def _is_alive(sender: dict[str, Any]) -> bool:
    """Whether a process of this machine runs; its start tells it from a later one of its number."""
    try:
        process = psutil.Process(sender["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:  # its parent has not asked yet how it ended
            return False
        return abs(process.create_time() - sender["started"]) < 2.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


@dataclass(frozen=True)
class Workers:
    """This process among those of the run.

    Attributes:
        rank: number of this process; process 0 prints, decides and writes the checkpoint.
        size: number of processes.
        store: how they communicate; None for a single process.
    """

    rank: int = 0
    size: int = 1
    store: KeyValueStore | None = field(default=None, repr=False, compare=False)

    @classmethod
    def join(cls) -> Workers:
        """The processes that ``torchrun`` started, or a launcher that sets the same variables.

        ``DTQ_TIMEOUT`` is the number of seconds without a heartbeat after which a process counts as
        dead; default: 600.

        Raises:
            InputError: a variable is missing, or is not a number.
            WorkerError: not all of them connected.
        """
        try:
            rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
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
        """Whether this is process 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has arrived.

        Raises:
            WorkerError: a process died.
        """
        self.broadcast(None)

    def broadcast(self, value: Any) -> Any:
        """The value of process 0, plain data, for every process; also a barrier.

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
        """Names of the tasks of this process, in the order given.

        The most expensive task is assigned first, each to the process with the lowest load so far;
        every process computes the same assignment.

        Args:
            costs: of each task, in any unit.
        """
        loads, own = [0.0] * self.size, set()
        for name in sorted(costs, key=lambda n: (-costs[n], n)):
            rank = loads.index(min(loads))
            loads[rank] += costs[name]
            if rank == self.rank:
                own.add(name)
        return [name for name in costs if name in own]

    def shard(self, count: int, batch_size: int) -> list[int]:
        """Indices of the samples of this process: whole batches, round robin.

        Args:
            count: number of samples.
            batch_size: samples in a batch.

        Raises:
            InputError: there are fewer batches than processes.
        """
        if -(-count // batch_size) < self.size:
            raise InputError(
                f"{count} in batches of {batch_size} are too few for {self.size} processes; ask "
                f"for more, or for smaller batches"
            )
        return [i for i in range(count) if i // batch_size % self.size == self.rank]


SINGLE_PROCESS = Workers()
