# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, also after a kill or a power cut."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dtq.errors import InputError


def atomic_replace(path: Path, write: Callable[[Path], Any]) -> None:
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


def atomic_write(path: Path, data: str | bytes) -> None:
    """:func:`replace_file` with text, as UTF-8, or bytes."""
    raw = data.encode() if isinstance(data, str) else data
    atomic_replace(path, lambda draft: draft.write_bytes(raw))


def make_directory(path: Path) -> None:
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


@contextmanager
def atomic_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``out`` to write into, renamed to it at the end, removed on any error.

    Raises:
        InputError: ``out`` exists and is not empty (without ``overwrite``), or is a file.
    """
    require_absent(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        side = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out.parent}: cannot write there ({error.strerror})") from error
    try:
        side.chmod(0o755)
        yield side
        old = None
        if out.exists():
            old = side.with_suffix(".old")
            out.rename(old)
        side.rename(out)
        if old is not None and old.is_symlink():
            old.unlink()  # the link, not what it leads to
        elif old is not None:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out}: could not be written ({error})") from error
    finally:
        shutil.rmtree(side, ignore_errors=True)


def require_absent(out: Path, *, overwrite: bool = False) -> None:
    """Raise :class:`InputError` unless ``out`` can be written."""
    if out.is_file():
        raise InputError(f"{out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out} is not empty; choose another folder or pass --overwrite")
