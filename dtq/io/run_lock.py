# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: a lock of the operating system on a file that names its owner.

The system releases the lock when the process ends, however it ends. Hosts share it over a network
file system that is mounted with locks, which cannot be known here. So the file of another host is
not taken over: its run was killed, or it is alive and the lock is not shared.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dtq.errors import InputError

log = logging.getLogger("dtq")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; it is removed at the end.

    The file of a run on this host that was killed is taken over, with a warning.

    Raises:
        InputError: another run holds the lock, and which one where that is known; or the file
            cannot be made.
    """
    lock, host, owner = FileLock(path), socket.gethostname(), None
    try:
        while not lock.is_locked:
            path.touch()
            inode, owner = _inode(path), _owner(path)
            lock.acquire(blocking=False)
            if _inode(path) != inode:  # the run before removed the file as it ended
                lock.release()
    except Timeout as error:
        who = "process {} on {}".format(*owner) if owner else "another run"
        raise InputError(
            f"{path}: {who} is writing here; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise InputError(f"{path.parent}: cannot write there ({error.strerror})") from error
    try:
        if owner and owner[1] != host:
            raise InputError(
                f"{path}: process {owner[0]} on {owner[1]} is writing here. If it is dead, delete "
                f"the file and run again"
            )
        if owner:
            log.warning("%s: process %s was killed; its lock is taken over", path, owner[0])
        with suppress(OSError):  # Windows lets nobody write into a locked file, or delete it
            path.write_text(json.dumps({"pid": os.getpid(), "host": host}), encoding="utf-8")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
    finally:
        lock.release()


def _owner(path: Path) -> tuple[object, object] | None:
    """Process id and host in a lock file; None if there is no file, or it does not say."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        data = json.loads(path.read_text(encoding="utf-8"))
        return data["pid"], data["host"]
    return None


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None
