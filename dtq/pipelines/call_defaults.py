# SPDX-License-Identifier: Apache-2.0
"""``dtq_call_defaults.json``: sizes for pipelines whose class has other sizes as defaults.

By default ``LattePipeline`` generates 16 frames of 512 pixels, whatever its weights were trained
on. This file in a pipeline folder holds the sizes that the weights were trained on, and dtq passes
them to every call; diffusers does not read the file. The folder may come from anywhere, so the file
can only hold sizes and the name of a shipped prompt set.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dtq.io import schema
from dtq.io.atomic import atomic_write
from dtq.io.package_data import prompt_sets
from dtq.io.safe_parse import read_json
from dtq.io.schema import key, within
from dtq.pipelines.settings import SamplingSettings

FILE = "dtq_call_defaults.json"
LARGEST = 8192
"""Largest size that the file may ask for, in pixels or frames."""


def _is_shipped(name: str) -> bool:
    return name in ("auto", *prompt_sets())


@dataclass(frozen=True)
class CallDefaults:
    """Arguments of a pipeline call that apply unless the user gives others.

    Attributes:
        sizes: integer arguments of the call by name.
        prompts: the prompt set that ``auto`` stands for; ``auto``: the same as for any pipeline.
    """

    sizes: dict[str, int] = field(default_factory=dict, metadata=key("", *within(1, LARGEST)))
    prompts: str = field(default="auto", metadata=key("", "a set that dtq ships", _is_shipped))

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
    return schema.parse(CallDefaults, read_json(path), str(path), strict=True)


def of(pipeline: Any) -> CallDefaults:
    """Read the file of the folder that a pipeline was loaded from."""
    path = getattr(getattr(pipeline, "config", None), "_name_or_path", None)
    return read(Path(path)) if path else CallDefaults()


def write(pipeline: Path, defaults: CallDefaults) -> None:
    """Write the file into a pipeline folder, unless there are no defaults."""
    if defaults != CallDefaults():
        atomic_write(pipeline / FILE, json.dumps(asdict(defaults), indent=2, sort_keys=True) + "\n")
