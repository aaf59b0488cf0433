# SPDX-License-Identifier: Apache-2.0
"""The run file, ``eval.json``: raw values of every sample, and the conditions they hold under."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dtq.errors import InputError
from dtq.io import schema
from dtq.io.safe_parse import finite_or_null, read_json
from dtq.io.schema import key

FORMAT = 1
"""Version of the run file; a gate refuses newer ones."""

JOB = ("prompts", "steps", "sampler", "guidance", "seed", "pipeline_args", "dtype")
"""Conditions without which two runs are not the same job."""

PLACE = ("hardware", "torch", "dtq", "recipe", "batch_size")
"""Conditions that a policy may ask to be the same."""

Value = float | list[float]
"""Of a sample, or of each of its steps; null in the file where it is not finite."""

_TABLES = key(kind=dict[str, dict[str, Any]])


@dataclass(frozen=True)
class Sample:
    """One picture or video that was asked for.

    Attributes:
        id: key of its values, and the name of its picture's file.
        prompt: what was asked for; samples of one prompt are one unit.
        seed: of its latents.
    """

    id: str = field(metadata=key("", "letters, digits, _ and -", re.compile(r"[\w-]+").fullmatch))
    prompt: str
    seed: int


@dataclass
class Run:
    """What the gate reads.

    Attributes:
        candidate, reference: as the user named them.
        conditions: of the job and of the place.
        identity: fingerprints of ``checkpoint`` and ``reference``, the ``recipe``.
        samples: in the order in which they were made.
        values: metric to sample id to value, or one value per step.
        rerun: the same against a second run of the float model; its difference is noise.
        failures: sample id to what went wrong.
        missing: figure that was asked for to why it is not there.
    """

    candidate: str
    reference: str
    conditions: dict[str, Any]
    identity: dict[str, str]
    samples: list[Sample]
    values: dict[str, dict[str, Value]] = field(metadata=_TABLES)
    rerun: dict[str, dict[str, Value]] = field(default_factory=dict, metadata=_TABLES)
    failures: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become null."""
        return {
            "format": FORMAT,
            "candidate": self.candidate,
            "reference": self.reference,
            "conditions": self.conditions,
            "identity": self.identity,
            "samples": [vars(sample) for sample in self.samples],
            "values": finite_or_null(self.values),
            "rerun": finite_or_null(self.rerun),
            "failures": self.failures,
            "missing": self.missing,
        }


def text(data: dict[str, Any]) -> str:
    """A JSON file's text, strict: no NaN, no Infinity."""
    return json.dumps(finite_or_null(data), indent=1, allow_nan=False) + "\n"


def read(where: str | Path) -> Run:
    """A run from an ``eval`` folder, its ``eval.json``, or a baseline file.

    Raises:
        InputError: no such file, not JSON that :func:`~dtq.io.safe_parse.parse_json` accepts, or
            not a run file; names all keys that are missing.
    """
    path = Path(where)
    path = path / "eval.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such run file; dtq eval ... -o FOLDER writes one")
    return parse(read_json(path, infinite=False), str(path))


def parse(data: Any, where: str = "run") -> Run:
    """A run from plain data; the gate checks the values, sample by sample.

    Args:
        data: what :meth:`Run.to_json` gave.
        where: begins the message, the file as a rule.

    Raises:
        InputError: a key is missing or of another type; names all of them.
    """
    if not isinstance(data, dict) or "format" not in data:
        raise InputError(f"{where}: not a run file of this dtq; make it again with dtq eval")
    if data["format"] != FORMAT:
        raise InputError(f"{where}: format {data['format']!r}, this dtq reads {FORMAT}")
    return schema.parse(Run, data, where, required=[f.name for f in fields(Run)])
