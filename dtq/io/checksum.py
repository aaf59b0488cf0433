# SPDX-License-Identifier: Apache-2.0
"""Checksums of tensors and digests of files; the only module that hashes anything.

It imports torch only when it is given a tensor: the wheel is built without torch and names the
compiled libraries by a digest.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def checksum(data: Tensor | bytes) -> int:
    """CRC-32 of the bytes, or of a tensor's bytes in row-major order, as a signed 32-bit number."""
    value = zlib.crc32(data if isinstance(data, bytes) else tensor_bytes(data))
    return value - (1 << 32) if value >= 1 << 31 else value


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any dtype and device, in row-major order."""
    import torch

    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def digest(chunks: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the chunks one after another, 64 hex digits."""
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def bytes_digest(data: bytes) -> str:
    """SHA-256 of bytes, 64 hex digits."""
    return digest([data])


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """SHA-256 of the names and contents of the files below a folder, at any depth.

    Args:
        folder: where to look.
        pattern: glob that the file names match.
    """
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    lines = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}" for path in files]
    return bytes_digest("\n".join(lines).encode())


def path_digest(path: Path) -> str:
    """:func:`folder_digest` of a folder, :func:`file_digest` of a file."""
    return folder_digest(path) if path.is_dir() else file_digest(path)
