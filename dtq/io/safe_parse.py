# SPDX-License-Identifier: Apache-2.0
"""Safe parsing of untrusted JSON and YAML: small, shallow, unique keys, finite numbers.

A document may come with a model from anywhere. It is data only: no tags that build objects, no
aliases (ten lines of them expand to gigabytes), no NaN, no repeated key. An error is one line that
names the file and the key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from dtq.errors import InputError

LARGEST_JSON = 64 * 2**20
"""Bytes. The config of a model with 10 000 quantized layers has 2 MB."""
LARGEST_YAML = 2**18
"""Bytes. The longest recipe shipped has 1 kB."""
DEEPEST = 64
"""Levels of lists and mappings. A model's config has five."""
LARGEST_INT = 2**63
"""The range of int64, which tensors have."""


def read_json(path: Path, *, infinite: bool = True) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: of the file.
        infinite: allow ``Infinity`` and ``-Infinity``, which schedulers of diffusers write.

    Raises:
        InputError: no such file, too large, or not a JSON object that :func:`parse_json` accepts.
    """
    data = parse_json(read_text(path, LARGEST_JSON), str(path), infinite=infinite)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object")
    return data


def read_text(path: Path, largest: int) -> str:
    """A text file.

    Args:
        path: of the file.
        largest: size in bytes up to which it is read.

    Raises:
        InputError: no such file, not a plain file, too large, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would never end
            raise InputError(f"{path}: not a file")
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if len(data) > largest:
        raise InputError(f"{path}: larger than {largest} bytes; nothing dtq reads is that long")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text ({error.reason} at byte {error.start})") from error


def parse_json(text: str, where: str, *, infinite: bool = False) -> Any:
    """Parse JSON.

    Args:
        text: the document.
        where: begins every message, the file as a rule.
        infinite: allow ``Infinity`` and ``-Infinity``.

    Raises:
        InputError: not JSON, a repeated key, NaN, an integer beyond 64 bits, or nested too deep.
    """
    try:
        data = json.loads(
            text,
            object_pairs_hook=_each_once,
            parse_constant=_no_nan if infinite else _no_constant,
            parse_float=_finite,
        )
    except _Refused as error:
        raise InputError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{where}: not JSON ({reason})") from error
    _bounded(data, where)
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML without aliases, tags, repeated keys, deep nesting and infinite numbers.

    Args:
        text: the document.
        where: begins every message, the file as a rule.

    Raises:
        InputError: names the line.
    """
    if len(text) > LARGEST_YAML:
        raise InputError(f"{where}: larger than {LARGEST_YAML} bytes; no recipe is that long")
    try:
        data = yaml.load(text, Loader=_Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: its constructors pass on those of int(), float() and date()
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    _bounded(data, where, finite=True)
    return data


def finite_or_null(value: Any) -> Any:
    """Plain data that strict JSON can hold: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_finite_numbers(value: object) -> bool:
    """Whether a value is a list of finite numbers."""
    return isinstance(value, list | tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value
    )


class _Refused(ValueError):
    """A document that the standard parser accepts and this module refuses."""


def _each_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise _Refused(f"the key {key!r} is there twice; keep one")
        data[key] = value
    return data


def _no_constant(name: str) -> float:
    raise _Refused(f"{name} is not a number")


def _no_nan(name: str) -> float:
    return _no_constant(name) if name == "NaN" else float(name)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"{text} is beyond the range of numbers")
    return value


def _bounded(data: Any, where: str, finite: bool = False) -> None:
    """Check depth, numbers and text, without recursion."""
    level, depth = [("", data)], 0
    while level:
        below: list[tuple[str, Any]] = []
        for at, value in level:
            if isinstance(value, dict):
                below += [(f"{at}.{key}"[-80:], item) for key, item in value.items()]
                if not all(_unicode(key) for key in value):
                    raise InputError(f"{where}: {at.lstrip('.')}: a key that is no Unicode text")
            elif isinstance(value, list):
                below += [(at, item) for item in value]
            elif isinstance(value, int) and abs(value) >= LARGEST_INT:
                raise InputError(f"{where}: {at.lstrip('.')}: a number beyond 64 bits")
            elif finite and isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{where}: {at.lstrip('.')}: a number that is not finite")
            elif not _unicode(value):
                raise InputError(f"{where}: {at.lstrip('.')}: no Unicode text")
        level, depth = below, depth + 1
        if depth > DEEPEST:
            raise InputError(f"{where}: nested deeper than {DEEPEST} levels")


def _unicode(value: object) -> bool:
    """False for text with half of a surrogate pair, which cannot be encoded."""
    try:
        if isinstance(value, str):
            value.encode()
        return True
    except UnicodeEncodeError:
        return False


class _Plain(yaml.SafeLoader):
    """A YAML loader that refuses aliases, deep nesting and repeated keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _at(event, f"the alias *{event.anchor}; write the value out")
        self.depth += 1
        if self.depth > DEEPEST:
            raise _at(event, f"nested deeper than {DEEPEST} levels")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = (key.tag, str(key.value))
            if name in names:
                raise _at(key, f"the key {key.value!r} is there twice; keep one")
            names.add(name)
        return super().construct_mapping(node, deep)


def _at(position: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=position.start_mark)
