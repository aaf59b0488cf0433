# SPDX-License-Identifier: Apache-2.0
"""Packages and weights that only some metrics need; an error says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from dtq.errors import InputError


def need(module: str, package: str) -> Any:
    """Import a module of a package that dtq does not depend on.

    Raises:
        InputError: the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this needs {package}: pip install {package} ({error})") from error


def pretrained(kind: str, source: str, option: str) -> Any:
    """Load a class of transformers by name, from a local folder or a hub id.

    Raises:
        InputError: transformers is not installed, or the model cannot be loaded; the message names
            the ``--extractor`` option.
    """
    cls = getattr(need("transformers", "transformers"), kind)
    try:
        return cls.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        advice = f"give a local folder: --extractor {option}=FOLDER"
        raise InputError(f"{source} cannot be loaded ({first}); {advice}") from error
