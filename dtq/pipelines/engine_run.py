# SPDX-License-Identifier: Apache-2.0
"""What a loaded model runs in, if not in dtq: for the conditions of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineRun:
    """An engine that runs a transformer from a file.

    Attributes:
        engine: its name in ``dtq.engines.runtimes.ENGINES``.
        versions: the packages and their versions, such as ``comfy-kitchen 0.2.40``.
        file: name of the file; of several, in the order of the transformers.
        sha256: of the file, or the folder, 64 hex digits; of several likewise.
        recipe: that the file names, or empty.
        bits: stored bits per weight, if dtq reads such files.
    """

    engine: str
    versions: str
    file: str
    sha256: str
    recipe: str
    bits: float | None
