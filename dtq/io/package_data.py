# SPDX-License-Identifier: Apache-2.0
"""Where the data folders are: installed beside the package, or at the top of a bare checkout."""

from __future__ import annotations

from pathlib import Path


def package_root() -> Path:
    """The folder of the package ``dtq`` itself."""
    return Path(__file__).resolve().parent.parent


def folder(name: str) -> Path:
    """The folder ``recipes``, ``calibration``, ``gate``, ``cpu_ext`` or ``cuda_ext``.

    Of a wheel, an editable install or a checkout.

    Raises:
        FileNotFoundError: neither place has it (a broken installation).
    """
    package = package_root()
    for place in (package / f"_{name}", package.parent / name):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"dtq is installed without its {name!r} folder; reinstall it")
