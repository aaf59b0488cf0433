# SPDX-License-Identifier: Apache-2.0
"""Read ``dtq_report.json`` for the page of ``dtq eval``; the file may come from anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtq.io import schema
from dtq.io.safe_parse import read_json


@dataclass(frozen=True)
class _Layer:
    name: str
    role: str
    weight_format: str
    transform: str
    promoted: bool
    bits: float
    error: float | None


@dataclass(frozen=True)
class _Input:
    name: str
    imbalance: tuple[float, ...]
    imbalance_after: tuple[float, ...]
    bins: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Report:
    """The keys of a report that the page reads."""

    layers: tuple[_Layer, ...]
    inputs: tuple[_Input, ...]


_OTHERS = ("vae", "pipeline", "bitsandbytes", "exported")
"""Entries of the file other than the reports of models."""


def quantization_report(folder: Path | None) -> dict[str, Any]:
    """The report that ``dtq quantize`` wrote into a checkpoint; empty when there is none.

    The reports of several models become one, names with that of the model in front. Entries that
    are no such report (the autoencoder, the whole pipeline) are left out.

    Raises:
        InputError: the file is there and is not what dtq writes; names the key.
    """
    file = folder / "dtq_report.json" if folder is not None else None
    if file is None or not file.is_file():
        return {}
    data = read_json(file)
    models = {k: v for k, v in data.items() if isinstance(v, dict) and k not in _OTHERS}
    if "layers" in data or not models:
        schema.parse(_Report, data, f"{file} (delete it to go without)")
        return data
    merged: dict[str, Any] = {"layers": [], "inputs": []}
    for name, report in models.items():
        schema.parse(_Report, report, f"{file} (delete it to go without): {name}")
        for key, rows in merged.items():
            rows += [{**row, "name": f"{name}.{row['name']}"} for row in report[key]]
    return merged
