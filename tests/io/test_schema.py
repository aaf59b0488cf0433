# SPDX-License-Identifier: Apache-2.0
"""The reader of documents: types, constraints, and every mistake in one message."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from dtq.errors import CheckpointError, InputError
from dtq.io import schema
from dtq.io.schema import RISING, MethodSpec, key, within


@dataclass(frozen=True)
class Part:
    name: str
    size: int = field(default=1, metadata=key("bytes", *within(1, 8)))


@dataclass(frozen=True)
class Document:
    title: str
    rate: float = 0.5
    on: bool = False
    method: MethodSpec = MethodSpec("none")
    edges: tuple[float, ...] = field(default=(), metadata=RISING)
    parts: tuple[Part, ...] = ()
    names: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict, metadata=key("", *within(0)))
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str | None = None


def test_a_document_is_read_with_the_types_of_its_fields():
    data = {
        "title": "x", "rate": 1, "on": True, "method": {"gptq": {"damp": 0.1}},
        "edges": [1, 2.5], "parts": [{"name": "a", "bytes": 8}], "names": ["b"],
        "sizes": {"h": 3}, "tables": {"t": {"u": None}}, "note": None, "newer": [1],
    }  # fmt: skip
    document = schema.parse(Document, data, "f.json")
    assert document == Document(
        "x", 1.0, True, MethodSpec("gptq", (("damp", 0.1),)), (1.0, 2.5), (Part("a", 8),), ["b"],
        {"h": 3}, {"t": {"u": None}},
    )  # fmt: skip
    assert isinstance(document.rate, float)


WRONG = {
    "title: expected a name, got 3": {"title": 3},
    "rate: expected a number, got nan": {"rate": math.nan},
    "rate: expected a number, got True": {"rate": True},
    "on: expected true or false, got 1": {"on": 1},
    "method: expected a method name": {"method": {"a": {}, "b": {}}},
    "edges: expected a list of numbers, got ['x']": {"edges": ["x"]},
    "edges: expected rising numbers, got [3, 1]": {"edges": [3, 1]},
    "parts: expected a list of parts, got [3]": {"parts": [3]},
    "parts[0].name: missing": {"parts": [{}]},
    "parts[0].bytes: expected whole numbers from 1 to 8, got 9": {
        "parts": [{"name": "a", "bytes": 9}]
    },
    "names: expected a list of names, got 'ab'": {"names": "ab"},
    "sizes: expected a mapping, got [1]": {"sizes": [1]},
    "sizes['h']: expected a whole number, got 1.5": {"sizes": {"h": 1.5}},
    "sizes: expected whole numbers from 0, got {'h': -1}": {"sizes": {"h": -1}},
    "tables['t']: expected a mapping, got 1": {"tables": {"t": 1}},
    "note: expected a name, got 1": {"note": 1},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_value_that_does_not_fit_is_named_with_its_key(message):
    with pytest.raises(CheckpointError) as caught:
        schema.parse(Document, {"title": "x", **WRONG[message]}, "f.json", CheckpointError)
    assert str(caught.value).startswith(f"f.json: {message}")
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_in_the_message_once():
    data = {"rate": "x", "parts": [{"bytes": 0}]}
    with pytest.raises(InputError) as caught:
        schema.parse(Document, data, "f.json", required=["title", "sizes"])
    assert sorted(str(caught.value).removeprefix("f.json: ").split("; ")) == [
        "parts[0].bytes: expected whole numbers from 1 to 8, got 0",
        "parts[0].name: missing",
        "rate: expected a number, got 'x'",
        "sizes: missing",
        "title: missing",
    ]


def test_a_message_is_short_however_many_mistakes_there_are():
    data = {"title": "x", "parts": [{}] * 1000}
    with pytest.raises(InputError, match=r"parts\[7\]\.name: missing; and 992 more$"):
        schema.parse(Document, data, "f.json")


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_a_document_is_a_mapping(data):
    with pytest.raises(InputError, match=r"^f\.json: expected a mapping, got "):
        schema.parse(Document, data, "f.json")


def test_what_a_person_wrote_has_no_unknown_key_and_no_null():
    problems: list[str] = []
    schema.read(Document, {"titel": "x", "note": None}, "a.", problems)
    assert problems == [
        "a.titel: unknown key; did you mean 'title'?",
        "a.note: expected a name, got None",
        "a.title: missing",
    ]
