# SPDX-License-Identifier: Apache-2.0
"""Checksums of tensors and texts (CRC-32), digests of files and folders (SHA-256)."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the tensor's bytes, as a signed 32-bit integer."""
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _signed(zlib.crc32(data))


def text_checksum(text: str) -> int:
    """CRC-32 of a text in UTF-8, as a signed 32-bit integer."""
    return _signed(zlib.crc32(text.encode()))


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """Digest of the names and contents of the files below a folder that match a pattern."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    lines = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}" for path in files]
    return bytes_digest("\n".join(lines).encode())


def path_digest(path: Path) -> str:
    """Digest of a file, or of the files below a folder."""
    return folder_digest(path) if path.is_dir() else file_digest(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(data: bytes) -> str:
    """SHA-256 of some bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()
