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
        InputError: it cannot be written; says why.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(draft)
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors has a class of its own for full disks
        raise InputError(f"{path}: could not be written ({error})") from error
    finally:
        draft.unlink(missing_ok=True)


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
