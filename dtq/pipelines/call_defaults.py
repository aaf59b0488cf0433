# SPDX-License-Identifier: Apache-2.0
"""``dtq_call_defaults.json``: default sizes of a pipeline, where those of its class do not fit.

``LattePipeline`` makes 16 frames of 512 pixels by default, whatever its weights were trained on.
This file in the folder of a pipeline holds the sizes that the weights were trained on. dtq uses
them; diffusers does not read the file. It comes with a model from anywhere, so it holds sizes and
the name of a shipped prompt set, nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dtq.io import schema
from dtq.io.atomic import atomic_write
from dtq.io.package_data import folder
from dtq.io.safe_parse import read_json
from dtq.io.schema import key, within
from dtq.pipelines.settings import SamplingSettings

FILE = "dtq_call_defaults.json"
LARGEST = 8192
"""Of a size: pixels or frames."""


def _is_shipped(name: str) -> bool:
    return name in ("auto", *(path.stem for path in folder("calibration").glob("*.txt")))



@dataclass(frozen=True)
class CallDefaults:
    """How to call a pipeline when the user gives no sizes and no prompt set.

    Attributes:
        sizes: whole numbers by argument of its call, in pixels or frames.
        set: the prompt set that ``auto`` stands for (``pipelines/prompts.py``), ``prompts`` in the
            file; ``auto`` is as for any pipeline.
    """

    sizes: dict[str, int] = field(default_factory=dict, metadata=key("", *within(1, LARGEST)))
    set: str = field(default="auto", metadata=key("prompts", "a set that dtq ships", _is_shipped))

    def fill(self, settings: SamplingSettings) -> SamplingSettings:
        """The settings with the sizes that they leave open; filling twice is filling once."""
        return replace(settings, pipeline_args={**self.sizes, **settings.pipeline_args})


def read(pipeline: Path) -> CallDefaults:
    """The file of a pipeline folder; a folder without it has no defaults.

    Raises:
        InputError: it holds anything but sizes and a prompt set.
    """
    path = pipeline / FILE
    if not path.exists():
        return CallDefaults()
    return schema.parse(CallDefaults, read_json(path), str(path), strict=True)


def of(pipeline: Any) -> CallDefaults:
    """The file of the folder that a pipeline was read from."""
    where = getattr(getattr(pipeline, "config", None), "_name_or_path", None)
    return read(Path(where)) if where else CallDefaults()


def write(pipeline: Path, call: CallDefaults) -> None:
    """Put the file into a pipeline folder; nothing when there are no defaults."""
    if call != CallDefaults():
        data = {"sizes": dict(call.sizes), "prompts": call.set}
        atomic_write(pipeline / FILE, json.dumps(data, indent=2, sort_keys=True) + "\n")

