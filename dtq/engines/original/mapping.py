# SPDX-License-Identifier: Apache-2.0
"""From the names of diffusers to original ones, row by row, as diffusers' own converter has it.

Every row of an original checkpoint gets a number. diffusers' converter for single files renames,
splits and swaps the numbered tensors, and the numbers in its output tell where each row of each
diffusers tensor came from. A model whose converted names are not those of diffusers is refused, so
that no map is a guess. Nothing is downloaded, and no tensor is wider than one column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from diffusers import __version__
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from dtq.engines.original.name_table import NameTable, table_for, tables
from dtq.errors import LIBRARY_ERRORS, InputError, first_line
from dtq.pipelines.validation import model_kind

Shapes = Mapping[str, tuple[int, ...]]
Fractions = tuple[str, Fraction, Fraction]
"""Name in diffusers, and the first row and number of rows as fractions of all."""


@dataclass(frozen=True)
class Part:
    """Rows of a tensor.

    Attributes:
        key: its name in diffusers.
        start: first row.
        rows: number of rows.
    """

    key: str
    start: int
    rows: int


@dataclass(frozen=True)
class Entry:
    """An original tensor.

    Attributes:
        parts: rows of diffusers' tensors, in the order of the original rows.
        shape: of the tensor.
        diffusers_shape: of the one tensor in it if that is another shape; None if it is not.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    diffusers_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class KeyMap:
    """The original tensors of a model.

    Attributes:
        family: name of the table.
        gguf: see :class:`NameTable`.
        entries: by original name; every row of every tensor of the model is in one.
        unused: original tensors that diffusers has no place for; their shape if they are written.
    """

    family: str
    gguf: str
    entries: dict[str, Entry]
    unused: dict[str, tuple[int, ...] | None] = field(default_factory=dict)


def key_map(config: Mapping[str, Any]) -> KeyMap | None:
    """The map of a model; None for a class without a table.

    Args:
        config: of diffusers, with ``_class_name``.

    Raises:
        InputError: the model cannot be built, or diffusers' converter does not read such a model,
            or not as the table says.
    """
    if not any(config.get("_class_name") in table.classes for table in tables()):
        return None
    config, shapes = described(config)
    table = table_for(config)
    if table is None:
        return None
    groups = _groups(table, shapes)
    listed = set(groups) if table.listed else set(table.unconverted)
    parts = {name: _whole(keys, shapes) for name, keys in groups.items() if name in listed}
    rest = {name: keys for name, keys in groups.items() if name not in listed}
    if rest and all(config.get(key) == value for key, value in table.reference.items()):
        parts |= _derived(rest, shapes, config, table)
    elif rest:  # the converter splits other sizes wrongly: derive for one that it reads
        like, like_shapes = described({**config, **table.reference})
        found = _derived(_groups(table, like_shapes), like_shapes, like, table)
        parts |= _resized(found, like_shapes, rest, shapes)
    entries = {}
    for name, keys in groups.items():
        other = shapes[keys[0]] if table.shape(name) else None
        entries[name] = Entry(parts[name], _original_shape(table, name, keys, shapes), other)
    return KeyMap(table.family, table.gguf, entries, _unused(table, config))


def described(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A config with every default, and the shapes of the model's tensors.

    The model is built without memory.

    Raises:
        InputError: it cannot be built.
    """
    kind: Any = model_kind(config.get("_class_name"))
    if kind is None:
        raise InputError(f"diffusers {__version__} has no model {config.get('_class_name')!r}")
    try:
        with torch.device("meta"):
            model = kind.from_config(dict(config))
    except LIBRARY_ERRORS as error:
        raise InputError(f"{kind.__name__} cannot be built ({first_line(error)})") from error
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return {**model.config, "_class_name": kind.__name__}, shapes


def _groups(table: NameTable, shapes: Shapes) -> dict[str, list[str]]:
    """Names in diffusers of the tensors in each original one, in the order of the table."""
    order = {rule[0]: place for place, rule in enumerate(table.rules)}
    groups: dict[str, list[str]] = {}
    for key in shapes:
        groups.setdefault(table.original(key), []).append(key)
    if table.listed:
        rank = {key: _rank(order, key) for keys in groups.values() for key in keys}
        groups = {name: sorted(keys, key=rank.__getitem__) for name, keys in groups.items()}
    return groups


def _rank(order: Mapping[tuple[str, ...], int], key: str) -> int:
    components = anonymous(key).split(".")
    prefixes = (tuple(components[:n]) for n in range(len(components), 0, -1))
    return next((order[prefix] for prefix in prefixes if prefix in order), -1)


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _whole(keys: list[str], shapes: Shapes) -> tuple[Part, ...]:
    return tuple(Part(key, 0, _rows(shapes[key])) for key in keys)


def _original_shape(
    table: NameTable, name: str, keys: list[str], shapes: Shapes
) -> tuple[int, ...]:
    first = shapes[keys[0]]
    if other := table.shape(name):
        size = math.prod(first) // math.prod(n for n in other if n != -1)
        return tuple(size if n == -1 else n for n in other)
    if any(shapes[key][1:] != first[1:] for key in keys):
        raise InputError(f"{name}: {', '.join(keys)} differ in shape, and cannot be one tensor")
    return (sum(_rows(shapes[key]) for key in keys), *first[1:]) if first else ()


def _unused(table: NameTable, config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {
        name: shape
        if shape is None
        else tuple(config[n] if isinstance(n, str) else n for n in shape)
        for name, shape in table.unused.items()
    }


def _derived(
    groups: Mapping[str, list[str]], shapes: Shapes, config: Mapping[str, Any], table: NameTable
) -> dict[str, tuple[Part, ...]]:
    """Parts of each original tensor, from the converter's output for numbered rows."""
    numbered: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    count = 0
    for name, keys in groups.items():
        whole = _original_shape(table, name, keys, shapes)
        shape = whole if table.shape(name) else (*whole[:1], *(1 for _ in whole[1:]))
        size = math.prod(shape)
        numbered[name] = torch.arange(count, count + size).reshape(shape)
        starts[name], count = count, count + size
    dropped = {name: torch.full(s, -1) for name, s in _unused(table, config).items() if s}
    converted = _converted(config, numbered | dropped)
    pieces: dict[str, list[tuple[int, Part]]] = {name: [] for name in groups}
    for name, keys in groups.items():
        for key in keys:
            got = converted.pop(key, None)
            if got is None:
                raise _wrong(config, f"{key} is missing, {name} should give it")
            at = got.reshape(-1) - starts[name]
            rows = math.prod(shapes[key]) if table.shape(name) else _rows(shapes[key])
            if len(at) != rows or bool(((at < 0) | (at >= numbered[name].numel())).any()):
                raise _wrong(config, f"{key} does not come from {name} alone")
            pieces[name] += _runs(key, at)
    left = [key for key, tensor in converted.items() if tensor is not None]
    if left:
        raise _wrong(config, f"{left[0]} is not in the model")
    result = {}
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece[0])
        ends = [0, *(at + part.rows for at, part in found)]
        if ends[:-1] != [at for at, _ in found] or ends[-1] != numbered[name].numel():
            raise _wrong(config, f"{name} is not used once")
        parts = tuple(part for _, part in found)
        if table.shape(name):
            if len(parts) > 1:
                raise _wrong(config, f"{name} is reordered")
            parts = _whole(groups[name], shapes)
        result[name] = parts
    return result


def _runs(key: str, at: Tensor) -> list[tuple[int, Part]]:
    """Consecutive rows of a tensor that are consecutive in the original one, with its row."""
    breaks = (at.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(at)]
    return [(int(at[a]), Part(key, a, b - a)) for a, b in zip(starts, ends, strict=True)]


class _Checkpoint(dict[str, Tensor]):
    """Knows the names that it had at first: diffusers looks for Cosmos 1.0 after emptying it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.names = frozenset(tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.names or super().__contains__(name)


def _converted(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output of diffusers' converter."""
    entry = SINGLE_FILE_LOADABLE_CLASSES.get(str(config.get("_class_name")))
    if entry is None:
        raise InputError(
            f"diffusers {__version__} reads no single files of {config.get('_class_name')}; "
            f"install a newer one, or keep its names: --names diffusers"
        )
    try:
        converted = entry["checkpoint_mapping_fn"](
            checkpoint=_Checkpoint(tensors), config=dict(config)
        )
    except LIBRARY_ERRORS as error:
        raise _wrong(config, first_line(error)) from error
    return dict(converted)


def _wrong(config: Mapping[str, Any], reason: str) -> InputError:
    return InputError(
        f"diffusers {__version__} does not convert original files of such a "
        f"{config.get('_class_name')} ({reason}); keep its names: --names diffusers"
    )


def _resized(
    found: Mapping[str, tuple[Part, ...]],
    like: Shapes,
    groups: Mapping[str, list[str]],
    shapes: Shapes,
) -> dict[str, tuple[Part, ...]]:
    """Parts in a model of other sizes: the same fractions of rows.

    A block that the reference model lacks is like all others of its names.
    """
    exact = {name: tuple(_fraction(part, like) for part in parts) for name, parts in found.items()}
    by_names: dict[tuple[str, ...], set[tuple[Fractions, ...]]] = {}
    for name, fractions in exact.items():
        alike = tuple((anonymous(key), start, rows) for key, start, rows in fractions)
        by_names.setdefault(_names(name, [f[0] for f in fractions]), set()).add(alike)
    result = {}
    for name, keys in groups.items():
        fractions = exact.get(name, ())
        by_key = {key: key for key in keys}
        if {key for key, _, _ in fractions} != set(keys):
            others = by_names.get(_names(name, keys), set())
            if len(others) != 1:
                raise InputError(f"{name}: diffusers' converter does not tell how it is split")
            (fractions,) = others
            by_key = {anonymous(key): key for key in keys}
        result[name] = tuple(
            _part(name, by_key[key], start, rows, shapes) for key, start, rows in fractions
        )
    return result


def _fraction(part: Part, shapes: Shapes) -> Fractions:
    total = _rows(shapes[part.key])
    return part.key, Fraction(part.start, total), Fraction(part.rows, total)


def _part(name: str, key: str, start: Fraction, rows: Fraction, shapes: Shapes) -> Part:
    total = _rows(shapes[key])
    if (start * total).denominator > 1 or (rows * total).denominator > 1:
        raise InputError(f"{name}: {total} rows of {key} cannot be split as in original files")
    return Part(key, int(start * total), int(rows * total))


def anonymous(key: str) -> str:
    """A name that is the same in every block: ``*`` for each number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key)


def _names(name: str, keys: Iterable[str]) -> tuple[str, ...]:
    return (anonymous(name), *sorted({anonymous(key) for key in keys}))
