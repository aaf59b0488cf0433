# SPDX-License-Identifier: Apache-2.0
"""The bundled model: a class-conditional emoji DiT, a stock diffusers ``DiTPipeline`` folder."""

from __future__ import annotations

from pathlib import Path

NAMES = ("demo", "demo-hard")
"""``demo-hard`` is ``demo`` with activation outliers, made on the fly by ``dtq.harden``."""


def folder() -> Path:
    """The pipeline folder.

    Raises:
        FileNotFoundError: the installation lacks its weights.
    """
    path = Path(__file__).resolve().parent / "pipeline"
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError("dtq is installed without its bundled model; reinstall it")
    return path
