# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: a file that names the owner's process and host."""

from __future__ import annotations

import glob
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from dtq.errors import InputError

log = logging.getLogger("dtq")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; it is removed at the end.

    A lock whose process is dead, on this host, is taken over, with a warning. Whether a process of
    another host lives cannot be known.

    Raises:
        InputError: another run holds it, says which; or the file cannot be made.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        while True:
            draft.write_text(json.dumps(process_identity()), encoding="utf-8")
            try:
                os.link(draft, path)  # never seen half-written, unlike a file opened with O_EXCL
                break
            except FileExistsError:
                _remove_dead(path)
            except FileNotFoundError:  # somebody cleared what looked left over
                continue
    except OSError as error:
        raise InputError(f"{path.parent}: cannot write there ({error.strerror})") from error
    finally:
        draft.unlink(missing_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}.*"):
        left.unlink(missing_ok=True)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def process_identity() -> dict[str, Any]:
    """This process; its start tells it from a later one with the same number."""
    started = psutil.Process().create_time()
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started}


def _remove_dead(path: Path) -> None:
    """Take away the lock of a dead process.

    Raises:
        InputError: it is not known to be dead.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return  # just released
    owner = _owner(text)
    if owner is None:
        raise InputError(f"{path}: not a lock of dtq; delete it if no run writes here")
    who = f"process {owner['pid']} on {owner['host']}"
    if owner["host"] != socket.gethostname():
        raise InputError(
            f"{path}: {who} is writing here. If it is dead, delete the file and run again"
        )
    if is_alive(owner):
        raise InputError(f"{path}: {who} is writing here; wait for it, or choose another folder")
    # rename first: of two runs that find a dead lock one gets it
    aside = path.with_name(f"{path.name}.{os.getpid()}.dead")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if aside.read_text(encoding="utf-8") != text:  # a third run was faster and lives
        with suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
        return
    aside.unlink()
    log.warning("%s: %s is dead, its lock is taken over", path, who)


def _owner(text: str) -> dict[str, Any] | None:
    try:
        data = json.loads(text)
    except ValueError:
        return None
    if isinstance(data, dict) and set(data) == {"pid", "host", "started"}:
        return data
    return None


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether a process of this host, as :func:`here` describes it, still runs."""
    try:
        process = psutil.Process(owner["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:  # nobody has asked yet how it ended
            return False
        return abs(process.create_time() - owner["started"]) < 2.0
    except (psutil.NoSuchProcess, ValueError, TypeError):
        return False
    except psutil.AccessDenied:
        return True
