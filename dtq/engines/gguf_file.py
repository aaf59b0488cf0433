# SPDX-License-Identifier: Apache-2.0
"""The container of a GGUF file, version 3: metadata, a list of tensors, aligned data.

All integers are little-endian. ``string`` is a uint64 length and UTF-8 bytes.

    "GGUF"  uint32 version  uint64 tensors  uint64 entries
    entries:  string key, uint32 type, value
    tensors:  string name, uint32 dimensions, uint64 sizes (innermost first), uint32 type, uint64 at
    padding to a multiple of 32, then the data; ``at`` counts from here

dtq reads files from anywhere. Every length is checked against the file before it is used, and the
data stays mapped. The reader of the package gguf has no such limits, hence this one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dtq.engines.gguf_blocks import BLOCK_TYPES
from dtq.errors import CheckpointError, InputError
from dtq.io.atomic import atomic_replace

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
STRING, ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_MOST_DIMENSIONS = 5
"""ggml has 4; published files of video models have 5 for convolutions."""
_MOST_ENTRIES = 2**16

FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
INTEGERS = {torch.int8: 24, torch.int16: 25, torch.int32: 26, torch.int64: 27, torch.float64: 28}
"""Number of each type that is stored as it is."""

_PLAIN = {number: dtype for dtype, number in (FLOATS | INTEGERS).items()}
_BLOCKS = {kind.number: name for name, kind in BLOCK_TYPES.items()}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        kind: key of ``BLOCK_TYPES``; empty for a type of torch.
        shape: of the values.
        data: the values, or the bytes of the blocks (rows, bytes).
    """

    kind: str
    shape: tuple[int, ...]
    data: Tensor


def write_gguf(
    path: Path, entries: Mapping[str, str | int], tensors: Mapping[str, GgufTensor]
) -> None:
    """Write a file by renaming a complete one; equal contents give equal bytes.

    Args:
        path: the file.
        entries: texts and numbers (uint32) of the metadata.
        tensors: by name, in the order of the file.

    Raises:
        InputError: the file cannot be written, or a tensor has a dtype or a number of dimensions
            that GGUF does not.
    """
    for name, tensor in tensors.items():
        if len(tensor.shape) > _MOST_DIMENSIONS:
            raise InputError(f"{name}: GGUF has no {len(tensor.shape)} dimensions")
        if not tensor.kind and tensor.data.dtype not in FLOATS | INTEGERS:
            raise InputError(f"{name}: GGUF has no {tensor.data.dtype}")
    atomic_replace(path, lambda draft: _write(draft, entries, tensors))


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The metadata and the tensors of a file; their data is mapped, not read.

    Raises:
        CheckpointError: the file is damaged, or a tensor has a type that dtq does not decode; names
            it.
    """
    try:
        data = np.memmap(path, mode="c")  # private: torch asks for memory that it may write
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    header = _Header(path, data)
    entries = header.entries()
    alignment = entries.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 2**16:
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}")
    infos = list(header.infos())
    start = -(-header.at // alignment) * alignment
    tensors = {}
    for name, shape, number, offset in infos:
        if name in tensors:
            raise CheckpointError(f"{path}: {name} is there twice")
        tensors[name] = _tensor(path, data, name, shape, number, start + offset)
    return entries, tensors


def is_gguf(path: Path) -> bool:
    """Whether a file starts as GGUF files do."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def _write(path: Path, entries: Mapping[str, str | int], tensors: Mapping[str, GgufTensor]) -> None:
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(entries)))
        for key, value in entries.items():
            _write_string(file, key)
            if isinstance(value, str):
                file.write(struct.pack("<I", STRING))
                _write_string(file, value)
            else:
                file.write(struct.pack("<II", 4, value))
        at = 0
        for name, tensor in tensors.items():
            _write_string(file, name)
            shape = tensor.shape or (1,)
            file.write(struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
            number = BLOCK_TYPES[tensor.kind].number if tensor.kind else None
            plain = FLOATS | INTEGERS
            file.write(
                struct.pack("<IQ", plain[tensor.data.dtype] if number is None else number, at)
            )
            at += -(-tensor.data.nbytes // ALIGNMENT) * ALIGNMENT
        _pad(file)
        for tensor in tensors.values():
            raw = tensor.data.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)
            _pad(file)


def _write_string(file: BinaryIO, text: str) -> None:
    data = text.encode()
    file.write(struct.pack("<Q", len(data)) + data)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


class _Header:
    """Reads values one after the other, never beyond the end of the file."""

    def __init__(self, path: Path, data: np.memmap[Any, Any]) -> None:
        self.path, self.data, self.at = path, data, 0
        if self.take(4) != MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file")
        version, self.num_tensors, self.num_entries = self.numbers("IQQ")
        if version not in (2, VERSION):
            raise CheckpointError(f"{path}: GGUF version {version}; dtq reads 2 and {VERSION}")
        if max(self.num_tensors, self.num_entries) > _MOST_ENTRIES:
            raise CheckpointError(
                f"{path}: {self.num_tensors} tensors and {self.num_entries} entries; damaged"
            )

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self.data) - self.at:
            raise CheckpointError(f"{self.path}: truncated or damaged; copy the file again")
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """The next numbers, in the letters of ``struct``."""
        layout = f"<{layout}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        """The next text."""
        (length,) = self.numbers("Q")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: a name is not text ({error})") from error

    def entries(self) -> dict[str, Any]:
        """The metadata."""
        entries = {}
        for _ in range(self.num_entries):
            key = self.string()
            (kind,) = self.numbers("I")
            entries[key] = self.value(kind)
        return entries

    def value(self, kind: int) -> Any:
        """The next value of a type; elements of arrays are not kept."""
        if kind == STRING:
            return self.string()
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: metadata of unknown type {kind}")
        element, count = self.numbers("IQ")
        if element in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[element]}"))
            return None
        if element != STRING or count > len(self.data) // 8:
            raise CheckpointError(f"{self.path}: an array of unknown type {element}")
        for _ in range(count):
            self.string()
        return None

    def infos(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """Name, shape, number of the type and place of each tensor."""
        for _ in range(self.num_tensors):
            name = self.string()
            (dimensions,) = self.numbers("I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise CheckpointError(f"{self.path}: {name} has {dimensions} dimensions")
            shape = self.numbers(f"{dimensions}Q")
            number, offset = self.numbers("IQ")
            yield name, tuple(reversed(shape)), number, offset


def _tensor(
    path: Path,
    data: np.memmap[Any, Any],
    name: str,
    shape: tuple[int, ...],
    number: int,
    start: int,
) -> GgufTensor:
    kind, columns = _BLOCKS.get(number, ""), shape[-1]
    count = 1
    for size in shape:
        count *= size
    if kind:
        block = BLOCK_TYPES[kind]
        if columns % block.columns or len(shape) != 2:
            raise CheckpointError(f"{path}: {name} has shape {list(shape)}, in blocks of {kind}")
        nbytes, dtype = count // block.columns * block.nbytes, torch.uint8
        stored: tuple[int, ...] = (shape[0], columns // block.columns * block.nbytes)
    elif number in _PLAIN:
        dtype, stored = _PLAIN[number], shape
        nbytes = count * dtype.itemsize
    else:
        known = ", ".join(BLOCK_TYPES)
        raise CheckpointError(f"{path}: {name} is of GGUF type {number}; dtq decodes {known}")
    if start + nbytes > len(data) or nbytes == 0:
        raise CheckpointError(f"{path}: {name} ends beyond the file; copy the file again")
    raw = torch.from_numpy(data[start : start + nbytes])
    if start % dtype.itemsize:
        raw = raw.clone()
    return GgufTensor(kind, shape, raw.view(dtype).reshape(stored))
