# SPDX-License-Identifier: Apache-2.0
"""Prompt sets: prompts or class labels to generate, shipped with dtq, local, or from the hub."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtq.errors import LIBRARY_ERRORS, InputError, first_line, hint
from dtq.io.package_data import folder, prompt_sets
from dtq.io.safe_parse import read_text
from dtq.pipelines import call_defaults

_COLUMNS = ("prompt", "caption", "text", "label", "class_label", "class")
_LARGEST = 2**26  # bytes of a text file
_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Requests:
    """What to generate.

    Attributes:
        name: of the prompt set.
        argument: of the pipeline call: ``prompt``, ``class_labels``, or ``batch_size`` where the
            pipeline is not conditioned; empty where an image is its only condition.
        entries: prompts or labels, one per image.
    """

    name: str
    argument: str
    entries: tuple[Any, ...]

    def arguments(self, start: int, count: int) -> dict[str, Any]:
        """The argument of a call for ``count`` requests from ``start`` on."""
        entries = list(self.entries[start : start + count])
        if self.argument == "batch_size":
            return {"batch_size": len(entries)}
        return {self.argument: entries} if self.argument else {}


def load(name: str, pipeline: Any, count: int, *, nested: bool = False) -> Requests:
    """Load ``count`` requests for a pipeline from a prompt set.

    Args:
        name: ``auto``; a set shipped in ``calibration/``; a local ``.txt`` (one entry per line),
            ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file; or
            ``hub:OWNER/NAME[:SPLIT[:COLUMN]]``.
        pipeline: decides between labels and prompts, and has the names of its labels.
        count: number of requests; a larger set is subsampled evenly, a smaller one is repeated.
        nested: whether the requests for a smaller count begin those for a larger one. Every such
            prefix is spread over the whole set.

    Returns:
        The requests; names of labels are converted to class numbers.

    Raises:
        InputError: the set does not exist, is empty or cannot be read, or an entry is not a label
            of the model.
    """
    argument = _argument(pipeline)
    if name == "auto":
        name = call_defaults.of(pipeline).prompts
    if name == "auto":
        entries = _own_labels(pipeline) if argument == "class_labels" else _shipped("prompts-64")
    elif name.startswith("hub:"):
        entries = _hub(name[4:])
    elif Path(name).suffix:
        entries = _file(Path(name))
    else:
        entries = _shipped(name)
    if not entries:
        raise InputError(f"prompt set {name!r} is empty")
    if argument == "class_labels":
        entries = [_label(entry, name, pipeline) for entry in entries]
    return Requests(name, argument, tuple((_spread if nested else _evenly)([*entries], count)))


def texts(requests: Requests, pipeline: Any) -> list[str]:
    """The prompt, or the name of the label, of each request."""
    labels = getattr(pipeline, "labels", None) or {}
    names = {number: name for name, number in labels.items()}
    return [str(names.get(entry, entry)) for entry in requests.entries]


def given(entries: list[str], pipeline: Any) -> Requests:
    """Requests from the command line: prompts, or names or numbers of labels."""
    argument = _argument(pipeline)
    requests: list[Any] = [*entries]
    if argument == "class_labels":
        requests = [_label(entry, "given", pipeline) for entry in entries]
    return Requests("given", argument, tuple(requests))


def _argument(pipeline: Any) -> str:
    parameters = inspect.signature(type(pipeline).__call__).parameters
    for argument in ("class_labels", "prompt"):
        if argument in parameters:
            return argument
    if "image" in parameters:  # Stable Video Diffusion
        return ""
    if "batch_size" in parameters:
        return "batch_size"
    raise InputError(
        f"{type(pipeline).__name__} takes none of class_labels, prompt, image and batch_size; dtq "
        f"cannot call it. Quantize its denoiser alone, with inputs=[...]"
    )


def _own_labels(pipeline: Any) -> list[Any]:
    """Every label that the pipeline names, else every class of the transformer (data-free)."""
    if labels := getattr(pipeline, "labels", None):
        return sorted(set(labels.values()))
    return list(range(pipeline.transformer.config.num_embeds_ada_norm))


def _shipped(name: str) -> list[Any]:
    known = prompt_sets()
    if name not in known:
        words = hint(name, known, f"there are {', '.join(known)}.", 1, 0.6)
        raise InputError(f"unknown prompt set {name!r}; {words} Or give a file or hub:OWNER/NAME")
    return _lines(folder("calibration") / f"{name}.txt")


def _file(path: Path) -> list[Any]:
    if not path.is_file():
        raise InputError(f"prompt set {path}: no such file")
    if path.suffix == ".txt":
        return _lines(path)
    if path.suffix not in _FILES:
        raise InputError(f"prompt set {path}: expected .txt, {', '.join(_FILES)}")
    file = str(path)
    return _column(file, "", _FILES[path.suffix], data_files=file, split="train")


def _hub(name: str) -> list[Any]:
    dataset, _, rest = name.partition(":")
    split, _, column = rest.partition(":")
    return _column(dataset, column, dataset, split=split or "train")


def _column(name: str, column: str, *args: str, **options: str) -> list[Any]:
    """A column of a dataset; without its name, the first of ``_COLUMNS`` that the dataset has."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "reading this set needs the package datasets: pip install dtq[eval]"
        ) from error
    try:
        table = datasets.load_dataset(*args, **options)
    except LIBRARY_ERRORS as error:
        raise InputError(f"prompt set {name}: cannot be read ({first_line(error)})") from error
    candidates = (column,) if column else _COLUMNS
    if found := [candidate for candidate in candidates if candidate in table.column_names]:
        return list(table[found[0]])
    raise InputError(f"prompt set {name}: has {table.column_names}, none of {candidates}")


def _lines(path: Path) -> list[Any]:
    lines = (line.strip() for line in read_text(path, _LARGEST).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _label(entry: Any, name: str, pipeline: Any) -> int:
    """The class number of a label, given as a number or as a name that the pipeline knows."""
    size = pipeline.transformer.config.num_embeds_ada_norm
    labels = getattr(pipeline, "labels", None) or {}
    if str(entry) in labels:
        return int(labels[str(entry)])
    try:
        number = int(entry)
    except (TypeError, ValueError) as error:
        near = hint(str(entry), labels, "", 3, 0.6)
        words = f"{entry!r} is not a label of this model" + (f"; {near}" if near else "")
        raise InputError(f"prompt set {name}: {words}") from error
    if not 0 <= number < size:
        raise InputError(f"prompt set {name}: label {number} is not in [0, {size})")
    return number


def _evenly(entries: list[Any], count: int) -> list[Any]:
    if len(entries) >= count:
        return [entries[i * len(entries) // count] for i in range(count)]
    return [entries[i % len(entries)] for i in range(count)]


def _spread(entries: list[Any], count: int) -> list[Any]:
    """The first ``count`` in golden-ratio order, of which every prefix covers the set evenly."""
    order = sorted(range(len(entries)), key=lambda i: (i * 0.6180339887498949) % 1)
    return [entries[order[i % len(order)]] for i in range(count)]
