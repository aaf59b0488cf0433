# SPDX-License-Identifier: Apache-2.0
"""``dtq_report.json`` as the page of ``dtq eval`` reads it; the file is untrusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtq.errors import InputError
from dtq.io.safe_parse import is_finite_numbers, read_json


def quantization_report(path: Path | None) -> dict[str, Any]:
    """The report of ``dtq quantize`` in a checkpoint folder; empty if there is none.

    The layers of several transformers are joined, with the component in front of their names.

    Raises:
        InputError: the file exists and is not what dtq writes; the message names the key.
    """
    file = path / "dtq_report.json" if path is not None else None
    if file is None or not file.is_file():
        return {}
    data = read_json(file)
    several = "layers" not in data and all(isinstance(part, dict) for part in data.values())
    if not data or not several:
        _check_report(data, str(file))
        return data
    found: dict[str, Any] = {key: [] for key in _REPORT}
    for name, part in data.items():  # a report of each transformer
        _check_report(part, f"{file}: {name}")
        for key, rows in found.items():
            rows += [{**row, "name": f"{name}.{row['name']}"} for row in part[key]]
    return found


def _check_report(data: dict[str, Any], where: str) -> None:
    for key, kinds in _REPORT.items():
        rows = data.get(key)
        if not isinstance(rows, list):
            raise InputError(f"{where}: {key!r} must be a list; delete the file to go without")
        for i, row in enumerate(rows):
            for name, fits in kinds.items():
                if not isinstance(row, dict) or name not in row or not fits(row[name]):
                    raise InputError(
                        f"{where}: {key}[{i}]: {name!r} is missing or not what dtq writes; delete "
                        f"the file to go without"
                    )


def _text(value: object) -> bool:
    return isinstance(value, str)


_REPORT: dict[str, dict[str, Callable[[Any], bool]]] = {
    "layers": {
        **dict.fromkeys(("name", "role", "weight_format", "transform"), _text),
        "promoted": lambda value: isinstance(value, bool),
        "bits": lambda value: is_finite_numbers([value]),
        "error": lambda value: value is None or is_finite_numbers([value]),
    },
    "inputs": {"name": _text, "imbalance": is_finite_numbers, "imbalance_after": is_finite_numbers},
}
"""What the page reads of the report, and what each must be."""
