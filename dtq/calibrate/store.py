# SPDX-License-Identifier: Apache-2.0
"""Statistics to one safetensors file and back: calibrate once, try many recipes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtq.calibrate.engine import Statistics
from dtq.calibrate.stats import SiteStats
from dtq.errors import CheckpointError, InputError

VERSION = "1"


def save(statistics: Statistics, path: Path) -> None:
    """Write to a side file, then rename.

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
    side = path.with_name(path.name + ".partial")
    save_file(tensors, side, metadata)
    side.replace(path)


def load(path: Path) -> Statistics:
    """Inverse of :func:`save`.

    Raises:
        InputError: no such file.
        CheckpointError: not a statistics file of this version, or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such statistics file; make one with dtq calibrate")
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("dtq_statistics") != VERSION:
                raise CheckpointError(
                    f"{path}: not statistics written by dtq calibrate, version {VERSION}"
                )
            for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                site, name = key.split("|")
                tensors.setdefault(site, {})[name] = file.get_tensor(key)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error}); run dtq calibrate again") from error
    sites = {site: SiteStats.from_tensors(parts) for site, parts in tensors.items()}
    return Statistics(sites, tuple(json.loads(metadata["edges"])), json.loads(metadata["about"]))
