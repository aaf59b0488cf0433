# SPDX-License-Identifier: Apache-2.0
"""Checksums of tensors and digests of files."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the tensor's bytes, as a signed 32-bit number."""
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _signed(zlib.crc32(data))


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """Hash of the names and contents of the files below a folder."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    lines = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}" for path in files]
    return bytes_digest("\n".join(lines).encode())


def path_digest(path: Path) -> str:
    return folder_digest(path) if path.is_dir() else file_digest(path)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
