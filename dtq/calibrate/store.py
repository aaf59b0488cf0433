# SPDX-License-Identifier: Apache-2.0
"""Statistics to one safetensors file and back: calibrate once, try many recipes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtq.calibrate.collection import Statistics
from dtq.calibrate.observers import InputStats
from dtq.errors import CheckpointError, InputError
from dtq.io.atomic import atomic_replace
from dtq.io.safe_parse import is_finite_numbers, parse_json

VERSION = "1"


def save(statistics: Statistics, path: Path) -> None:
    """Write a file that is whole or absent; the same statistics make the same bytes.

    Raises:
        InputError: the folder does not exist, or cannot be written.
    """
    tensors = {
        f"{site}|{key}": tensor.contiguous()
        for site, stats in statistics.inputs.items()
        for key, tensor in stats.tensors().items()
    }
    metadata = {
        "dtq_statistics": VERSION,
        "edges": json.dumps(list(statistics.edges)),
        "about": json.dumps(statistics.about),
    }

    def write(draft: Path) -> None:
        save_file(tensors, draft, metadata)
        _order_metadata(draft)

    atomic_replace(path, write)


def _order_metadata(path: Path) -> None:
    """Sort the metadata in the header: safetensors writes its keys in an order of chance."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def load(*paths: Path) -> Statistics:
    """What :func:`save` wrote, of one model; sites are read from disk when they are asked for.

    Raises:
        InputError: no such file, or files of different runs.
        CheckpointError: not a statistics file of this version, or damaged.
    """
    where: dict[str, Path] = {}
    headers = set()
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such statistics file; make one with dtq calibrate")
        with _opened(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("dtq_statistics") != VERSION:
                raise CheckpointError(
                    f"{path}: not statistics written by dtq calibrate, version {VERSION}"
                )
            headers.add((metadata.get("edges", ""), metadata.get("about", "")))
            where |= dict.fromkeys(_checked_sites(path, file, metadata), path)
    if len(headers) != 1:
        raise InputError(f"{', '.join(map(str, paths))}: statistics of different runs")
    ((edges, about),) = headers
    said = parse_json(about, f"{paths[0]}: about")
    if not isinstance(said, dict) or not all(
        isinstance(v, str | int | float) for v in said.values()
    ):
        raise CheckpointError(f"{paths[0]}: 'about' must map words to words and numbers")
    return Statistics(_OnDisk(where), tuple(_edges(paths[0], edges)), said)


def _edges(path: Path, text: str) -> list[float]:
    edges: Any = parse_json(text, f"{path}: edges")
    if not is_finite_numbers(edges) or edges != sorted(edges):
        raise CheckpointError(f"{path}: 'edges' must be a rising list of numbers")
    found: list[float] = edges
    return found


def _checked_sites(path: Path, file: Any, metadata: Mapping[str, str]) -> list[str]:
    """Names of the sites; every tensor has the dtype and shape that the others and the bins ask.

    Only the header is read: a file that lies about sizes is refused before anything is allocated.
    """
    bins = len(_edges(path, metadata.get("edges", ""))) + 1
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
        site, bar, part = key.partition("|")
        if not bar or part not in _PARTS:
            raise CheckpointError(f"{path}: {key!r} is not a statistic; run dtq calibrate again")
        tensor = file.get_slice(key)
        found.setdefault(site, {})[part] = tensor.get_dtype(), tuple(tensor.get_shape())
    for site, parts in found.items():
        kinds = Counter(_PARTS[part][0] for part in parts)
        if kinds["channels"] != 5 or any(n != _PARTS_OF[kind] for kind, n in kinds.items()):
            raise CheckpointError(
                f"{path}: {site}: statistics are missing; run dtq calibrate again"
            )
        columns = (*parts["channels.low"][1], 0, 0)[1]
        rows = (*parts.get("sample.rows", ("", ()))[1], 0)[0]
        sizes = {"B": bins, "K": columns, "R": rows, "1": 1}
        for part, (dtype, shape) in parts.items():
            _, wanted, axes = _PARTS[part]
            expected = tuple(sizes[axis] for axis in axes)
            if dtype != wanted or shape != expected or not columns:
                raise CheckpointError(
                    f"{path}: {site}|{part} is {dtype} {list(shape)}, expected {wanted} "
                    f"{list(expected)}; run dtq calibrate again"
                )
    return list(found)


_PARTS = {
    "channels.low": ("channels", "F32", "BK"),
    "channels.high": ("channels", "F32", "BK"),
    "channels.total": ("channels", "F64", "BK"),
    "channels.square": ("channels", "F64", "BK"),
    "channels.rows": ("channels", "I64", "B"),
    "hessian.hessian": ("hessian", "F32", "KK"),
    "hessian.count": ("hessian", "I64", "1"),
    "sample.rows": ("sample", "F32", "RK"),
    "sample.key": ("sample", "I64", "R"),
    "sample.stratum": ("sample", "I64", "R"),
}
"""Tensors of a site: the statistic, dtype and axes: B bins, K channels, R sampled rows."""

_PARTS_OF = Counter(kind for kind, _, _ in _PARTS.values())


class _OnDisk(Mapping[str, InputStats]):
    """Sites by name, read anew at every look: of a large model they do not fit in memory."""

    def __init__(self, where: dict[str, Path]) -> None:
        self.where = where

    def __getitem__(self, name: str) -> InputStats:
        with _opened(self.where[name]) as file:
            keys = [k for k in file.keys() if k.split("|")[0] == name]  # noqa: SIM118
            tensors = {k.split("|")[1]: file.get_tensor(k) for k in keys}
        self._check(name, tensors)
        return InputStats.from_tensors(tensors)

    def _check(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Values that are counts or places; what is measured is judged where it is used."""
        bins, _ = tensors["channels.low"].shape
        limits = {"channels.rows": 2**62, "hessian.count": 2**62, "sample.key": 2**31}
        limits["sample.stratum"] = 2 * bins
        for part, most in limits.items():
            values = tensors.get(part)
            if values is not None and bool(((values < 0) | (values >= most)).any()):
                raise CheckpointError(
                    f"{self.where[name]}: {name}|{part} holds numbers outside of 0 to {most - 1}; "
                    f"run dtq calibrate again"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); run dtq calibrate again") from error
