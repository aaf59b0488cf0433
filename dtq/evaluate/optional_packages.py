# SPDX-License-Identifier: Apache-2.0
"""Packages and weights that only some figures need: there, or a message that says what to do."""

from __future__ import annotations

import importlib
from typing import Any

from dtq.errors import InputError


def need(module: str, package: str) -> Any:
    """A module of a package that dtq does not depend on.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this needs {package}: pip install {package} ({error})") from error


def pretrained(kind: Any, where: str, option: str) -> Any:
    """What ``kind.from_pretrained`` gives for a local folder or hub id.

    Raises:
        InputError: it cannot be loaded; names the ``--extractor`` that takes a folder.
    """
    try:
        return kind.from_pretrained(where)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"{where} cannot be loaded ({first}); give a local folder: --extractor {option}=FOLDER"
        ) from error
