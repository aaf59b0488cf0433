# SPDX-License-Identifier: Apache-2.0
"""The bundled models, plain diffusers folders of a DiT, a Latte and two FLUX pipelines."""

from __future__ import annotations

from pathlib import Path

FOLDERS = {
    "demo": "pipeline",
    "demo-outliers": "pipeline",
    "demo-video": "video",
    "demo-text": "text",
    "demo-text-4step": "text-4step",
}
"""Folder of each model. ``demo-outliers`` is ``demo`` after ``dtq.demo.outliers``."""


def path_of(name: str) -> Path:
    """The folder of a bundled model, or the path that the name is."""
    return folder(name) if name in FOLDERS else Path(name)


def folder(name: str = "demo") -> Path:
    """The pipeline folder of a bundled model, a key of ``FOLDERS``.

    Raises:
        FileNotFoundError: the installation lacks its weights.
    """
    path = Path(__file__).resolve().parent / FOLDERS[name]
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError("dtq is installed without its bundled models; reinstall it")
    return path
