# SPDX-License-Identifier: Apache-2.0
"""``dtq_call_defaults.json``: sizes for pipelines whose class has other sizes as defaults.

By default ``LattePipeline`` generates 16 frames of 512 pixels, whatever its weights were trained
on. This file in a pipeline folder holds the sizes that the weights were trained on, and dtq passes
them to every call; diffusers does not read the file. The folder may come from anywhere, so the file
can only hold sizes and the name of a shipped prompt set.
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
"""Largest size that the file may ask for, in pixels or frames."""


@dataclass(frozen=True)
class CallDefaults:
    """Arguments of a pipeline call that apply unless the user gives others.

    Attributes:
        sizes: integer arguments of the call by name.
        prompts: the prompt set that ``auto`` stands for; ``auto``: the same as for any pipeline.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    prompts: str = "auto"

    def fill(self, settings: SamplingSettings) -> SamplingSettings:
        """The settings, with the sizes that they do not give. Idempotent."""
        return replace(settings, pipeline_args={**self.sizes, **settings.pipeline_args})


def read(pipeline: Path) -> CallDefaults:
    """Read the file of a pipeline folder; without a file there are no defaults.

    Raises:
        InputError: the file holds something else than sizes and a prompt set.
    """
    path = pipeline / FILE
    if not path.exists():
        return CallDefaults()
    data = read_json(path)
    if extra := sorted(set(data) - {"prompts", "sizes"}):
        raise InputError(f"{path}: unknown key {extra[0]!r}; the keys are sizes and prompts")
    sizes, prompts = data.get("sizes", {}), data.get("prompts", "auto")
    if not isinstance(sizes, dict) or not all(_is_size(value) for value in sizes.values()):
        raise InputError(f"{path}: sizes: expected whole numbers from 1 to {LARGEST} by name")
    if prompts not in ("auto", *(known.stem for known in folder("calibration").glob("*.txt"))):
        raise InputError(f"{path}: prompts: {prompts!r} is not a prompt set that dtq ships")
    return CallDefaults(sizes, prompts)


def of(pipeline: Any) -> CallDefaults:
    """Read the file of the folder that a pipeline was loaded from."""
    path = getattr(getattr(pipeline, "config", None), "_name_or_path", None)
    return read(Path(path)) if path else CallDefaults()


def write(pipeline: Path, defaults: CallDefaults) -> None:
    """Write the file into a pipeline folder, unless there are no defaults."""
    if defaults != CallDefaults():
        data = {"sizes": dict(defaults.sizes), "prompts": defaults.prompts}
        atomic_write(pipeline / FILE, json.dumps(data, indent=2, sort_keys=True) + "\n")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST
