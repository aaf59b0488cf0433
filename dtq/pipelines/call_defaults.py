# SPDX-License-Identifier: Apache-2.0
"""``dtq_call_defaults.json``: the call that fits a pipeline whose class has other sizes as defaults.

``LattePipeline`` makes 16 frames of 512 pixels unless told otherwise, whatever its weights were
trained on. A folder with this file says what they were trained on, and dtq calls it so; diffusers
does not read it. It comes with a model from anywhere, so it holds sizes and the name of a shipped
set, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dtq.errors import InputError
from dtq.io.atomic import atomic_write
from dtq.io.package_data import folder
from dtq.io.safe_parse import read_json
from dtq.pipelines.settings import SamplingSettings

FILE = "dtq_call_defaults.json"
LARGEST = 8192
"""Of a size: pixels or frames."""


@dataclass(frozen=True)
class CallDefaults:
    """How to call a pipeline when the user says nothing.

    Attributes:
        sizes: arguments of its call, whole numbers.
        set: what ``auto`` means for it (``calibrate/sets.py``); ``auto`` is as for any pipeline.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    set: str = "auto"

    def fill(self, settings: SamplingSettings) -> SamplingSettings:
        """``how`` with the sizes that it leaves open; filling twice is filling once."""
        return replace(settings, pipeline_args={**self.sizes, **settings.pipeline_args})


def read(pipeline: Path) -> CallDefaults:
    """The file of a pipeline folder; a folder without it says nothing.

    Raises:
        InputError: it holds something else than sizes and a set.
    """
    path = pipeline / FILE
    if not path.exists():
        return CallDefaults()
    data = read_json(path)
    if extra := sorted(set(data) - {"prompts", "sizes"}):
        raise InputError(f"{path}: unknown key {extra[0]!r}; it has sizes and set")
    sizes, chosen = data.get("sizes", {}), data.get("prompts", "auto")
    if not isinstance(sizes, dict) or not all(_size(value) for value in sizes.values()):
        raise InputError(f"{path}: sizes: expected whole numbers from 1 to {LARGEST} by name")
    if chosen not in ("auto", *(known.stem for known in folder("calibration").glob("*.txt"))):
        raise InputError(f"{path}: set: {chosen!r} is not one that dtq ships")
    return CallDefaults(sizes, chosen)


def of(pipeline: Any) -> CallDefaults:
    """The file of the folder that a pipeline was read from."""
    where = getattr(getattr(pipeline, "config", None), "_name_or_path", None)
    return read(Path(where)) if where else CallDefaults()


def write(pipeline: Path, call: CallDefaults) -> None:
    """Put the file into a pipeline folder; nothing when there is nothing to say."""
    if call != CallDefaults():
        data = {"sizes": dict(call.sizes), "prompts": call.set}
        atomic_write(pipeline / FILE, json.dumps(data, indent=2, sort_keys=True) + "\n")


def _size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST
