# SPDX-License-Identifier: Apache-2.0
"""Statistics to one safetensors file and back: calibrate once, try many recipes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dtq.calibrate.engine import Statistics
from dtq.calibrate.stats import SiteStats
from dtq.durable import replace_file
from dtq.errors import CheckpointError, InputError

VERSION = "1"


def save(statistics: Statistics, path: Path) -> None:
    """Write a file that is whole or absent.

    Raises:
        InputError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")
    tensors = {
        f"{site}|{key}": tensor.contiguous()
        for site, stats in statistics.sites.items()
        for key, tensor in stats.tensors().items()
    }
    metadata = {
        "dtq_statistics": VERSION,
        "edges": json.dumps(list(statistics.edges)),
        "about": json.dumps(statistics.about),
    }
    replace_file(path, lambda draft: save_file(tensors, draft, metadata))


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
            headers.add((metadata["edges"], metadata["about"]))
            where |= {key.split("|")[0]: path for key in file.keys()}  # noqa: SIM118
    if len(headers) != 1:
        raise InputError(f"{', '.join(map(str, paths))}: statistics of different runs")
    ((edges, about),) = headers
    return Statistics(_OnDisk(where), tuple(json.loads(edges)), json.loads(about))


class _OnDisk(Mapping[str, SiteStats]):
    """Sites by name, read anew at every look: of a large model they do not fit in memory."""

    def __init__(self, where: dict[str, Path]) -> None:
        self.where = where

    def __getitem__(self, name: str) -> SiteStats:
        with _opened(self.where[name]) as file:
            keys = [k for k in file.keys() if k.split("|")[0] == name]  # noqa: SIM118
            return SiteStats.from_tensors({k.split("|")[1]: file.get_tensor(k) for k in keys})

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error}); run dtq calibrate again") from error
