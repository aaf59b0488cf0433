# SPDX-License-Identifier: Apache-2.0
"""The run file, ``eval.json``: raw values of every sample, and the conditions of the run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtq.errors import InputError
from dtq.evaluate import feature_file
from dtq.evaluate.feature_file import FeatureFile
from dtq.io import schema
from dtq.io.safe_parse import finite_or_null, read_json
from dtq.io.schema import key

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
"""Version of the run file; a gate refuses every other version."""

JOB = ("prompts", "steps", "sampler", "guidance", "seed", "pipeline_args", "dtype")
"""Conditions that must be equal for two runs of the same job."""

MATCHABLE = ("hardware", "torch", "dtq", "recipe", "batch_size", "engine")
"""Conditions that a policy may require to be equal; ``engine`` is dtq unless it is recorded."""

Value = float | list[float]


def mean_of(value: Value, steps: slice = slice(None)) -> float:
    """The value of a sample; the mean over ``steps`` if it has one value per step."""
    if not isinstance(value, list):
        return float(value)
    chosen = value[steps]
    return sum(chosen) / len(chosen)


_TABLES = key(kind=dict[str, dict[str, Any]])


@dataclass(frozen=True)
class Sample:
    """One image, video or sound.

    Attributes:
        id: key of its values.
        prompt: or the label; samples of one prompt are one statistical unit.
        seed: of its latents.
    """

    id: str = field(metadata=key("", "letters, digits, _ and -", re.compile(r"[\w-]+").fullmatch))
    prompt: str
    seed: int


@dataclass(frozen=True)
class Contribution:
    """The float pipeline with one quantized component.

    Attributes:
        component: its name.
        error: relative squared error of a step with the float run's latents, mean over the steps;
            None for an autoencoder, which takes part in no step.
        share: of the sum of these errors.
        divergence: relative squared distance of the latents at the last step, both runs free.
        psnr: dB against the float pipeline's images of the same seeds, median; None for sounds.
    """

    component: str = field(metadata=key("", "a name", re.compile(r"\w+").fullmatch))
    error: float | None
    share: float | None
    divergence: float
    psnr: float | None


@dataclass
class Run:
    """The values of one evaluation, as the gate reads them.

    Attributes:
        candidate: name of the quantized model.
        reference: name of the float model.
        conditions: of the job and the machine.
        identity: fingerprints ``checkpoint`` and ``reference`` of both models, and the ``recipe``;
            of a candidate that an engine runs from a file also ``file`` and ``sha256``.
        samples: in the order of the requests.
        values: metric to sample id to value, or to one value per step.
        rerun: the same against a second run of the float model; the difference is noise.
        failures: id of a sample that cannot be used, to the reason.
        missing: requested metric without values, to the reason.
        image_sets: those for metrics of whole sets; None if no such metric was requested.
        components: what each component adds to the error, if that was asked for.
        folder: of the file that the run was read from, which holds the features, too.
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
    image_sets: FeatureFile | None = None
    components: list[Contribution] = field(default_factory=list)
    folder: Path = field(default=Path(), init=False, compare=False)

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """Features of the image sets, (N, D) by ``<side>.<extractor>.<kind>``.

        Raises:
            InputError: the run has no image sets, or their file is missing or another one.
        """
        if self.image_sets is None:
            raise InputError("no image sets; evaluate with --num-images 256 --metric fid")
        return feature_file.read(self.folder, self.image_sets)

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become null."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        data["samples"] = [vars(sample) for sample in self.samples]
        data["image_sets"] = None if self.image_sets is None else asdict(self.image_sets)
        data["components"] = [vars(row) for row in self.components]
        if not self.components:
            del data["components"]
        return finite_or_null({"format": FORMAT, **data})


def text(data: dict[str, Any]) -> str:
    """A JSON file's text, strict: no NaN, no Infinity."""
    return json.dumps(finite_or_null(data), indent=1, allow_nan=False) + "\n"


def read(where: str | Path) -> Run:
    """A run from an ``eval`` folder, its ``eval.json``, or a baseline file.

    Raises:
        InputError: no such file, not JSON that :func:`~dtq.io.safe_parse.parse_json` accepts, or
            not a run file; the message names all keys that are missing.
    """
    path = Path(where)
    path = path / "eval.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such run file; dtq eval ... -o FOLDER writes one")
    run = parse(read_json(path, infinite=False), str(path))
    run.folder = path.parent
    return run


def parse(data: Any, where: str = "run") -> Run:
    """A run from plain data; the values are looked at by the gate, sample by sample.

    Raises:
        InputError: a part is missing or of another type; names all of them.
    """
    advice = "make it again with dtq eval"
    if not isinstance(data, dict) or "format" not in data:
        raise InputError(f"{where}: not a run file of this dtq; {advice}")
    found = data["format"]
    if found != FORMAT:
        raise InputError(f"{where}: format {found!r}, this dtq reads {FORMAT}; {advice}")
    optional = ("image_sets", "components")
    required = [f.name for f in fields(Run) if f.init and f.name not in optional]
    return schema.parse(Run, data, where, required=required)
