# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: a lock file that names the owner's process and host."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLock, Timeout

from dtq.errors import InputError

log = logging.getLogger("dtq")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, which is removed at the end.

    The existence of the file is the lock (``filelock.SoftFileLock``), so that it also holds on
    network file systems. The lock of a dead process of this host is taken over, with a warning.
    Whether a process of another host is alive cannot be known.

    Raises:
        InputError: another run holds the lock; says which. Or the file cannot be written.
    """
    existed = path.exists()
    lock = SoftFileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{path}: {_owner(path)} is writing here. Wait for it, or choose another folder; if it "
            f"is dead, delete the file and run again"
        ) from error
    except OSError as error:
        raise InputError(f"{path.parent}: cannot write there ({error.strerror})") from error
    if existed:
        log.warning("%s: its owner is dead, the lock is taken over", path)
    try:
        yield
    finally:
        lock.release()


def _owner(path: Path) -> str:
    """The first two lines of a lock file are process id and host."""
    try:
        pid, host, *_ = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return "another run"
    return f"process {pid} on {host}"
