# SPDX-License-Identifier: Apache-2.0
"""A short run of fuzz.py, and that it would notice."""

from __future__ import annotations

from collections import Counter

import fuzz
import pytest

from dtq.errors import InputError
from dtq.io import checksum


@pytest.fixture(scope="module")
def short() -> tuple[Counter, list[str]]:
    return fuzz.run(0, 150)


def test_every_damaged_file_loads_or_is_refused(short):
    outcomes, failures = short
    assert failures == []
    assert sum(outcomes.values()) == 150


def test_every_kind_of_file_came_up_and_some_were_refused(short):
    outcomes, _ = short
    assert {name for name, _ in outcomes} == set(fuzz.TARGETS) == set(fuzz.SHARE)
    assert sum(n for (_, what), n in outcomes.items() if what == "refused") > 75


@pytest.mark.parametrize(
    ("error", "words"),
    [(KeyError("x"), "KeyError: 'x'"), (InputError(""), "a message of 0 characters")],
)
def test_another_error_is_a_failure(error, words, monkeypatch):
    def broken(path):
        raise error

    monkeypatch.setattr(fuzz, "TARGETS", {"x": fuzz.Target("*.yaml", ("",), broken)})
    monkeypatch.setattr(fuzz, "SHARE", {"x": 1})
    _, failures = fuzz.run(0, 1)
    assert len(failures) == 1
    assert words in failures[0]


def test_no_end_is_a_failure(monkeypatch):
    def hangs(path):
        while True:
            checksum.checksum  # noqa: B018

    monkeypatch.setattr(fuzz, "TARGETS", {"x": fuzz.Target("*.yaml", ("",), hangs)})
    monkeypatch.setattr(fuzz, "SHARE", {"x": 1})
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    _, failures = fuzz.run(0, 1)
    assert failures == ["seed 0: no end after 1 s"]
