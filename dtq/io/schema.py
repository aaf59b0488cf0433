# SPDX-License-Identifier: Apache-2.0
"""Plain data to dataclasses and back: unknown keys, wrong types and unknown names are collected."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

LARGEST = 10**9
"""No knob of a method is larger."""


def read(kind: type[Any], data: Mapping[str, Any], at: str, problems: list[str]) -> Any:
    """Build a dataclass from a mapping; what is wrong goes to ``problems``.

    Fields may be strings, numbers, booleans, a :class:`Call`, another dataclass, a free mapping,
    or a tuple of strings, whole numbers or dataclasses.

    Args:
        kind: the dataclass.
        data: keys and values, as YAML gives them.
        at: where the mapping is, ``"rules[0]."``, for messages.
        problems: is added to. While it is empty the result is as the data says.
    """
    known, kinds = {f.name: f for f in fields(kind)}, get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{at}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            problems.append(f"{where}: unknown key{hint}")
            continue
        values[key] = _value(kinds[key], value, where, problems)
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            problems.append(f"{at}{name}: missing")
            values[name] = ""
    return kind(**values)


def plain(value: Any) -> Any:
    """Inverse of :func:`read`: what YAML writes; fields that are None are left out."""
    if isinstance(value, MethodSpec):
        return {value.name: dict(value.knobs)} if value.knobs else value.name
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if is_dataclass(value):
        found = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return {k: v for k, v in found.items() if v is not None}
    return value


def check_name(
    name: str, table: Iterable[str], at: str, problems: list[str], what: str = "name"
) -> bool:
    """Whether a table has the name; otherwise the nearest ones are suggested."""
    known = list(table)
    if name in known:
        return True
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
    problems.append(f"{at}: unknown {what} {name!r}; {hint}")
    return False


def check_method(
    call: MethodSpec, table: Mapping[str, Callable[..., Any]], at: str, problems: list[str]
) -> None:
    """The method and its knobs exist, and the knobs are of the type of their defaults."""
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
        default = knobs[knob]
        number = isinstance(default, int | float) and not isinstance(default, bool)
        fits = abs(value) <= LARGEST if _number(value) else False
        fits = fits if number else isinstance(value, type(default))
        if isinstance(value, bool) != isinstance(default, bool) or not fits:
            words = _words(type(default))
            problems.append(f"{at}.{call.name}.{knob}: expected {words}, got {_shown(value)}")


def _value(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """A value of a field, or something of its type if it does not fit."""
    kind = _present(kind)
    if kind is MethodSpec:
        return _call(value, where, problems)
    if is_dataclass(kind):
        if isinstance(value, Mapping):
            return read(kind, value, f"{where}.", problems)  # type: ignore[arg-type]
    elif get_origin(kind) is tuple:
        each = get_args(kind)[0]
        entry = Mapping if is_dataclass(each) else each
        right = (isinstance(v, entry) and not isinstance(v, bool) for v in _entries(value))
        if isinstance(value, list | tuple) and all(right):
            return tuple(_value(each, v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    elif get_origin(kind) is dict:
        if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            return dict(value)
    elif kind == str | float:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    elif kind is float:
        if _number(value) and not isinstance(value, bool):
            return float(value)
    elif type(value) is kind:
        return value
    problems.append(f"{where}: expected {_words(kind)}, got {_shown(value)}")
    return {int: 1, float: 1.0, bool: False}.get(kind, "")


def _entries(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _present(kind: Any) -> Any:
    """``X`` of ``X | None``: a key that is there has a value."""
    some = [k for k in get_args(kind) if k is not NoneType]
    return some[0] if NoneType in get_args(kind) and len(some) == 1 else kind


def _shown(value: object) -> str:
    """A value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def _number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        each: type[Any] = get_args(kind)[0]
        plain_kinds = {str: "a list of names", int: "a list of whole numbers"}
        return plain_kinds.get(each, f"a list of {each.__name__.lower()}s")
    return {
        str: "a name",
        str | float: "a number or a size",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
    }.get(kind, "a mapping")


def _call(value: Any, where: str, problems: list[str]) -> MethodSpec:
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
