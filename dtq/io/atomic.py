# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file or folder is whole or absent, also after a kill or a power cut."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dtq.errors import InputError


def atomic_replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a temporary file in the same folder, then rename it to ``path``.

    The temporary name holds the process id, so two processes never write into one file.

    Raises:
        InputError: the folder does not exist, or cannot be written; the message says why.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # by the umask; safetensors makes its files private
        write(draft)
        draft.chmod(mode)
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors has a class of its own for full disks
        raise InputError(f"{path}: could not be written ({error})") from error
    finally:
        draft.unlink(missing_ok=True)


def atomic_write(path: Path, data: str | bytes) -> None:
    """:func:`atomic_replace` with bytes, or with text as UTF-8."""
    raw = data.encode() if isinstance(data, str) else data
    atomic_replace(path, lambda draft: draft.write_bytes(raw))


def atomic_save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file by :func:`atomic_replace`; equal contents give equal bytes.

    Raises:
        InputError: the folder does not exist, or cannot be written.
    """
    stored = _storable(tensors)

    def write(draft: Path) -> None:
        save_file(stored, draft, dict(metadata) or None)
        if len(metadata) > 1:
            _sort_metadata(draft)

    atomic_replace(path, write)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory: safetensors refuses any others."""
    storages: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        on_cpu = tensor.detach().cpu().contiguous()
        address = on_cpu.untyped_storage().data_ptr()
        stored[name] = on_cpu.clone() if address in storages else on_cpu
        storages.add(address)
    return stored


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header: safetensors writes its keys in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def make_directory(path: Path) -> None:
    """Make a folder to write into, with its parents.

    Raises:
        InputError: it cannot be made; the message says why.
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
    """Give a temporary folder to write into; it is renamed to ``out`` at the end.

    On any error the temporary folder is removed and ``out`` stays as it was.

    Raises:
        InputError: ``out`` is a file, is a folder that is not empty (without ``overwrite``), or
            cannot be written.
    """
    require_absent(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
        draft.mkdir()
    except OSError as error:
        raise InputError(f"{out.parent}: cannot write there ({error.strerror})") from error
    try:
        yield draft
        old = None
        if out.exists():
            old = draft.with_suffix(".old")
            out.rename(old)
        draft.rename(out)
        if old is not None and old.is_symlink():
            old.unlink()  # the link, not the folder that it points to
        elif old is not None:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out}: could not be written ({error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def require_absent(out: Path, *, overwrite: bool = False) -> None:
    """Check that a folder can be written.

    Raises:
        InputError: ``out`` is a file, or a folder that is not empty (without ``overwrite``).
    """
    if out.is_file():
        raise InputError(f"{out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out} is not empty; choose another folder or pass --overwrite")
