# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, also after a kill or a power cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dtq.errors import InputError


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside ``path``, then move it there.

    The name of the side file has the process id: two processes do not write into one file.

    Raises:
        InputError: there is no such folder, or it cannot be written; says why.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(draft)
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors has a class of its own for full disks
        raise InputError(f"{path}: could not be written ({error})") from error
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, data: str | bytes) -> None:
    """:func:`replace_file` with text, as UTF-8, or bytes."""
    raw = data.encode() if isinstance(data, str) else data
    replace_file(path, lambda draft: draft.write_bytes(raw))


def write_folder(path: Path) -> None:
    """Make a folder to write into, and those above it.

    Raises:
        InputError: it cannot be made; says why.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror or error})") from error


def sync_tree(folder: Path) -> None:
    """Wait until every file below a folder is on the disk."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX opens folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
