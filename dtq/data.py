# SPDX-License-Identifier: Apache-2.0
"""Where the data folders are: installed beside the package, or at the top of a bare checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder ``recipes``, ``calibration``, ``gate``, ``cpu_ext`` or ``cuda_ext``.

    Of a wheel, an editable install or a checkout.

    Raises:
        FileNotFoundError: neither place has it (a broken installation).
    """
    for place in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"dtq is installed without its {name!r} folder; reinstall it")
