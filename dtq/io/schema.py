# SPDX-License-Identifier: Apache-2.0
"""The one reader of documents: plain data to dataclasses, with every mistake collected.

A dataclass is the schema: its fields name the keys and types of a mapping, ``metadata=key(...)``
what else a value must be. A field is a string, number or boolean, a :class:`MethodSpec`, another
dataclass, a ``tuple[X, ...]`` or ``list[X]`` of those, ``dict[str, X]``, ``Any``, or one of all
these ``| None``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dtq.errors import DtqError, InputError, hint

LARGEST = 10**9
"""No knob of a method is larger."""

_SHOWN = 8  # mistakes of a document that a program wrote

T = TypeVar("T")


def key(
    name: str = "",
    expected: str = "",
    holds: Callable[[Any], object] | None = None,
    kind: Any = None,
    null: bool = False,
) -> dict[str, Any]:
    """Metadata of a field.

    Args:
        name: key in the document; default: the name of the field.
        expected: words for what the value must be.
        holds: whether a value of the right type is that.
        kind: type in the document; default: the type of the field.
        null: a person may write null for None, as a program may.
    """
    return {"name": name, "expected": expected, "holds": holds, "kind": kind, "null": null}


RISING = key(expected="rising numbers", holds=lambda numbers: list(numbers) == sorted(numbers))
"""Metadata of a tuple of numbers in rising order."""


def within(least: int, most: int = 2**63) -> tuple[str, Callable[[Any], bool]]:
    """Words and check of :func:`key` for a number, or each in a tuple or mapping, within bounds."""

    def holds(value: Any) -> bool:
        items = value.values() if isinstance(value, Mapping) else value
        return all(least <= v <= most for v in (items if isinstance(items, Iterable) else [items]))

    return f"whole numbers from {least}" + (f" to {most}" if most < 2**63 else ""), holds


def parse(
    kind: type[T],
    data: object,
    where: str,
    error: type[DtqError] = InputError,
    *,
    required: Iterable[str] = (),
    strict: bool = False,
) -> T:
    """:func:`read` for a document that a program wrote; one that does not fit raises.

    Args:
        kind: the dataclass.
        data: what JSON gave.
        where: begins the message, the file as a rule.
        error: class of the exception.
        required: keys that must be there although their fields have defaults.
        strict: see :func:`read`; by default unknown keys are ignored and optional values may be
            null.

    Raises:
        DtqError: of class ``error``; one line that names the keys.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where}: expected a mapping, got {_shown(data)}")
    problems = [f"{name}: missing" for name in required if name not in data]
    document = read(kind, data, "", problems, strict=strict)
    if problems:
        lines = list(dict.fromkeys(problems))
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise error(f"{where}: {'; '.join(lines[:_SHOWN])}{more}")
    return document


def read(
    kind: type[T], data: Mapping[str, Any], at: str, problems: list[str], *, strict: bool = True
) -> T:
    """Build a dataclass from a mapping, and collect what is wrong.

    Args:
        kind: the dataclass.
        data: keys and values, as YAML or JSON gives them.
        at: where the mapping is, ``"rules[0]."``, for messages.
        problems: is added to. While it is empty the result is as the data says.
        strict: a person wrote the data: unknown keys are mistakes, and so is null unless the field
            has ``key(null=True)``.
    """
    known = _fields(kind)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in data.items():
        where, before = f"{at}{name}", len(problems)
        if name in known:
            field, type_ = known[name]
            no_null = strict and not field.metadata.get("null")
            values[field.name] = result = _value(type_, value, where, problems, no_null)
            holds = field.metadata.get("holds")
            if holds and result is not None and len(problems) == before and not holds(result):
                expected = field.metadata["expected"]
                problems.append(f"{where}: expected {expected}, got {_shown(value)}")
        elif strict:
            near = difflib.get_close_matches(str(name), known, 1)
            words = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            problems.append(f"{where}: unknown key; {words}")
    for name, (field, _) in known.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in values:
            problems.append(f"{at}{name}: missing")
            values[field.name] = ""
    return kind(**values)


def plain(value: Any) -> Any:
    """Inverse of :func:`read`: what YAML writes; fields that are None are left out."""
    if isinstance(value, MethodSpec):
        return {value.name: dict(value.knobs)} if value.knobs else value.name
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if is_dataclass(value):
        data = {
            f.metadata.get("name") or f.name: plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
        }
        return {k: v for k, v in data.items() if v is not None}
    return value


def check_name(
    name: str, table: Iterable[str], at: str, problems: list[str], what: str = "name"
) -> bool:
    """Check that a table has a name, and otherwise suggest the nearest ones.

    Args:
        name: as the document gives it.
        table: the known names.
        at: where the name is, for the message.
        problems: is added to.
        what: kind of name, for the message.
    """
    known = list(table)
    if name in known:
        return True
    words = hint(name, known, f"known: {', '.join(known) or 'none'}")
    problems.append(f"{at}: unknown {what} {name!r}; {words}")
    return False


def check_method(
    call: MethodSpec, table: Mapping[str, Callable[..., Any]], at: str, problems: list[str]
) -> None:
    """Check that a method and its knobs exist, and that the knobs have the type of their defaults.

    Args:
        call: as the recipe gives it.
        table: the known methods; their keyword arguments are the knobs.
        at: where the method is, for messages.
        problems: is added to.
    """
    if not check_name(call.name, table, at, problems):
        return
    parameters = inspect.signature(table[call.name]).parameters
    knobs = {
        name: p.default
        for name, p in parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
        and p.default is not inspect.Parameter.empty
        and name not in ("progress", "tasks")  # the caller's, not the recipe's
    }
    for knob, value in call.knobs:
        if not check_name(knob, knobs, f"{at}.{call.name}", problems, "knob"):
            continue
        number, kind = _is_number(knobs[knob]), type(knobs[knob])
        if not _fits(float if number else kind, value) or (number and abs(value) > LARGEST):
            words = _words(kind)
            problems.append(f"{at}.{call.name}.{knob}: expected {words}, got {_shown(value)}")


@functools.cache
def _fields(kind: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Key in the document to field and type."""
    types = get_type_hints(kind)
    return {
        f.metadata.get("name") or f.name: (f, f.metadata.get("kind") or types[f.name])
        for f in dataclasses.fields(kind)
        if f.init
    }


def _value(kind: Any, value: Any, where: str, problems: list[str], strict: bool) -> Any:
    """A value of a field, or something of its type if it does not fit."""
    if NoneType in get_args(kind):
        if value is None and not strict:
            return None
        kind = next(k for k in get_args(kind) if k is not NoneType)
    if kind is Any:
        return value
    if kind is MethodSpec:
        return _method(value, where, problems)
    item = get_args(kind)[-1] if get_origin(kind) is dict else next(iter(get_args(kind)), None)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return read(kind, value, f"{where}.", problems, strict=strict)  # type: ignore[arg-type]
    if get_origin(kind) in (tuple, list) and isinstance(value, list | tuple):
        if all(_fits(item, v) for v in value):
            places = enumerate(value)
            items = (_value(item, v, f"{where}[{i}]", problems, strict) for i, v in places)
            return get_origin(kind)(items)
    elif get_origin(kind) is dict and isinstance(value, Mapping):
        if all(isinstance(k, str) for k in value):
            pairs = value.items()
            return {k: _value(item, v, f"{where}[{k!r}]", problems, strict) for k, v in pairs}
    elif _fits(kind, value):
        return value if kind in (int, bool) else float(value) if kind is float else str(value)
    problems.append(f"{where}: expected {_words(kind)}, got {_shown(value)}")
    return {int: 1, float: 1.0, bool: False}.get(kind, "")


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value has the type; of an item that is a dataclass, whether it is a mapping."""
    if is_dataclass(kind):
        return isinstance(value, Mapping)
    if kind is float:
        return _is_number(value)
    if kind == str | float:
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    return type(value) is kind


def _shown(value: object) -> str:
    """A value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _words(kind: Any) -> str:
    if get_origin(kind) in (tuple, list):
        item: type[Any] = get_args(kind)[0]
        lists = {str: "names", int: "whole numbers", float: "numbers"}
        return f"a list of {lists.get(item) or item.__name__.lower().strip('_') + 's'}"
    return {
        str: "a name",
        str | float: "a number or a size",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
    }.get(kind, "a mapping")


def _method(value: Any, where: str, problems: list[str]) -> MethodSpec:
    if isinstance(value, MethodSpec):
        return value
    if isinstance(value, str):
        return MethodSpec(value)
    if isinstance(value, Mapping) and len(value) == 1:
        name, knobs = next(iter(value.items()))
        if isinstance(name, str) and (knobs is None or isinstance(knobs, Mapping)):
            return MethodSpec(name, tuple(sorted((knobs or {}).items())))
    problems.append(
        f"{where}: expected a method name, or one name with its knobs, got {_shown(value)}"
    )
    return MethodSpec("")


@dataclass(frozen=True)
class MethodSpec:
    """A row of a method table and its knobs, as a recipe writes it: ``gptq: {damp: 0.02}``."""

    name: str
    knobs: tuple[tuple[str, Any], ...] = ()
