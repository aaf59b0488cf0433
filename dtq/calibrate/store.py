# SPDX-License-Identifier: Apache-2.0
"""The file of statistics: calibrate once, try many recipes.

Tensors are named ``<input group>|<observer>.<tensor>``; version, timestep edges and provenance are
in the metadata. The file may come from anywhere: its header is checked before a tensor is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtq.calibrate.collection import Statistics
from dtq.calibrate.observers import InputStats
from dtq.errors import CheckpointError, InputError
from dtq.io import schema
from dtq.io.atomic import atomic_save_tensors
from dtq.io.safe_parse import parse_json

VERSION = "2"
"""Of the file; others are refused."""

_TENSORS = {
    "channels": {
        "low": ("F32", "BK"),
        "high": ("F32", "BK"),
        "total": ("F64", "BK"),
        "square": ("F64", "BK"),
        "rows": ("I64", "B"),
    },
    "hessian": {"hessian": ("F32", "KK"), "count": ("I64", "1")},
    "sample": {"rows": ("F32", "RK"), "key": ("I64", "R"), "stratum": ("I64", "R")},
}
"""Dtype and axes of the tensors of each observer: B bins, K channels, R sampled rows."""


def save(statistics: Statistics, path: Path) -> None:
    """Write a file that is whole or absent; the same statistics make the same bytes.

    Raises:
        InputError: the folder does not exist, or cannot be written.
    """
    tensors = {
        f"{name}|{key}": tensor
        for name, stats in statistics.inputs.items()
        for key, tensor in stats.tensors().items()
    }
    metadata = {
        "dtq_statistics": VERSION,
        "edges": json.dumps(list(statistics.edges)),
        "about": json.dumps(statistics.about),
    }
    atomic_save_tensors(path, tensors, metadata)


def load(*paths: Path) -> Statistics:
    """Inverse of :func:`save`; each input group is read from disk when it is accessed.

    Args:
        paths: files with different input groups of one run.

    Raises:
        InputError: no such file, or files of different runs.
        CheckpointError: not a statistics file of this version, or damaged.
    """
    files: dict[str, Path] = {}
    headers = set()
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such statistics file; make one with dtq calibrate")
        with _opened(path) as file:
            metadata = file.metadata() or {}
            version = metadata.get("dtq_statistics")
            if version != VERSION:
                actual = f"version {version}" if version else "no statistics"
                raise _refused(path, f"{actual}, this dtq reads statistics of version {VERSION}")
            header = metadata.get("edges", ""), metadata.get("about", "")
            headers.add(header)
            texts = zip(("edges", "about"), header, strict=True)
            data = {key: parse_json(text, f"{path}: {key}") for key, text in texts}
            document = schema.parse(_Metadata, data, str(path), CheckpointError)
            files |= dict.fromkeys(_checked_groups(path, file, len(document.edges) + 1), path)
    if len(headers) != 1:
        raise InputError(f"{', '.join(map(str, paths))}: statistics of different runs")
    return Statistics(_OnDisk(files), document.edges, document.about)


@dataclass(frozen=True)
class _Metadata:
    edges: tuple[float, ...] = field(metadata=schema.RISING)
    about: dict[str, Any] = field(
        metadata=schema.key(
            expected="text and numbers by name",
            holds=lambda about: all(isinstance(v, str | int | float) for v in about.values()),
        )
    )


def _checked_groups(path: Path, file: Any, bins: int) -> list[str]:
    """Names of the input groups; every tensor has the dtype and shape that follow from the others.

    Only the header is read: a file with wrong sizes is refused before anything is allocated.
    """
    groups: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
        name, bar, tensor = key.rpartition("|")
        if not bar:
            raise _refused(path, f"{key!r} is not a statistic")
        header = file.get_slice(key)
        groups.setdefault(name, {})[tensor] = header.get_dtype(), list(header.get_shape())
    for name, tensors in groups.items():
        observers = {"channels", *(tensor.split(".")[0] for tensor in tensors)}
        sizes = {
            "B": bins,
            "K": (tensors.get("channels.low", ("", []))[1] + [0, 0])[1],
            "R": (tensors.get("sample.rows", ("", []))[1] + [0])[0],
            "1": 1,
        }
        expected = {
            f"{observer}.{tensor}": (dtype, [sizes[axis] for axis in axes])
            for observer in _TENSORS
            if observer in observers
            for tensor, (dtype, axes) in _TENSORS[observer].items()
        }
        if tensors.get("channels.low", ("", [1]))[1][1:] == [0]:
            raise _refused(path, f"{name}: no channels")
        for tensor in [*(t for t in tensors if t not in expected), *expected]:
            if tensors.get(tensor) != expected.get(tensor):
                wanted, got = (_described(x.get(tensor)) for x in (expected, tensors))
                raise _refused(path, f"{name}|{tensor}: expected {wanted}, got {got}")
    return list(groups)


def _described(header: tuple[str, list[int]] | None) -> str:
    return "no tensor" if header is None else f"{header[0]} {header[1]}"


class _OnDisk(Mapping[str, InputStats]):
    """Statistics by input group, read anew at every access: they may not fit in memory together."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files

    def __getitem__(self, name: str) -> InputStats:
        with _opened(self.files[name]) as file:
            keys = [k for k in file.keys() if k.rpartition("|")[0] == name]  # noqa: SIM118
            tensors = {k.rpartition("|")[2]: file.get_tensor(k) for k in keys}
        self._check(name, tensors)
        return InputStats.from_tensors(tensors)

    def _check(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Check counts and indices; what was measured is checked where it is used."""
        bins, _ = tensors["channels.low"].shape
        limits = {"channels.rows": 2**62, "hessian.count": 2**62, "sample.key": 2**31}
        limits["sample.stratum"] = 2 * bins
        for key, most in limits.items():
            values = tensors.get(key)
            if values is not None and bool(((values < 0) | (values >= most)).any()):
                wrong = f"{name}|{key} holds numbers outside of 0 to {most - 1}"
                raise _refused(self.files[name], wrong)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise _refused(path, f"damaged ({error})") from error


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: {reason}; run dtq calibrate again")
