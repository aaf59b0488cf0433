# SPDX-License-Identifier: Apache-2.0
"""Other libraries: whether they are installed, and their versions."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def versions(*packages: str) -> str:
    """Packages and their versions, such as ``openvino 2026.4.1, nncf 3.4.0``."""
    return ", ".join(f"{package} {version(package).split('+')[0]}" for package in packages)
