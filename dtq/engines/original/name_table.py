# SPDX-License-Identifier: Apache-2.0
"""The tables in ``names/``: original names of the tensors of a family, one YAML file each.

    names:
      double_blocks.*.img_attn.qkv: transformer_blocks.*.attn.{to_q,to_k,to_v}

The original name is left, the names of diffusers are right. ``*`` is a number, ``*+1`` the number
plus one, and braces list the modules whose rows are one original tensor. A rule holds for every
name that starts with it, and the longest rule decides. A name without a rule stays as it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

Rule = tuple[tuple[str, ...], str]
"""Components of a name in diffusers, and the original name."""


@dataclass(frozen=True)
class NameTable:
    """A file of ``names/``.

    Attributes:
        family: name of the file.
        classes: of diffusers.
        rules: longest first.
        where: values of the config that tell versions with other names apart.
        gguf: the family's name in ``general.architecture`` of GGUF files; empty if it has none.
        reference: values of the config that diffusers' converter has as constants.
        shapes: shapes of original tensors that differ from those of diffusers, by name.
        unused: tensors that diffusers drops. Their shape, in numbers and keys of the config, if
            its converter expects them; otherwise None, and they are not written.
        unconverted: original tensors that diffusers' converter misses, and other engines read.
        listed: diffusers has no converter, and rows are in the order of the table.
    """

    family: str
    classes: tuple[str, ...]
    rules: tuple[Rule, ...]
    where: Mapping[str, Any] = field(default_factory=dict)
    gguf: str = ""
    reference: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, list[int]] = field(default_factory=dict)
    unused: Mapping[str, list[int | str] | None] = field(default_factory=dict)
    unconverted: tuple[str, ...] = ()
    listed: bool = False

    def original(self, key: str) -> str:
        """The original name of a tensor.

        Args:
            key: its name in diffusers.
        """
        components = key.split(".")
        for pattern, name in self.rules:
            numbers = _numbers(pattern, components)
            if numbers is not None:
                rest = components[len(pattern) :]
                return ".".join([_filled(name, numbers), *rest])
        return key

    def shape(self, name: str) -> list[int] | None:
        """The shape of an original tensor where it differs from that in diffusers, -1 for any."""
        for pattern, shape in self.shapes.items():
            if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name):
                return shape
        return None


@functools.cache
def tables() -> tuple[NameTable, ...]:
    """Every table; those that ask for values of the config come first."""
    folder = resources.files(__package__) / "names"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    found = [_table(f.name.removesuffix(".yaml"), yaml.safe_load(f.read_text())) for f in files]
    return tuple(sorted(found, key=lambda table: not table.where))


def table_for(config: Mapping[str, Any]) -> NameTable | None:
    """The table of a model; None if there is none.

    Args:
        config: of diffusers, with ``_class_name``.
    """
    for table in tables():
        fits = all(config.get(key) == value for key, value in table.where.items())
        if config.get("_class_name") in table.classes and fits:
            return table
    return None


def _table(family: str, data: dict[str, Any]) -> NameTable:
    rules = [
        (tuple(each.split(".")), name)
        for name, pattern in data["names"].items()
        for each in _expanded(pattern)
    ]
    return NameTable(
        family,
        tuple(data["classes"]),
        tuple(sorted(rules, key=lambda rule: -len(rule[0]))),
        unconverted=tuple(data.get("unconverted", ())),
        **{key: data[key] for key in data.keys() - {"classes", "names", "unconverted"}},
    )


def _expanded(pattern: str) -> list[str]:
    """``a.{b,c}`` as ``a.b`` and ``a.c``."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inside, _, after = rest.partition("}")
    return [f"{before}{each}{after}" for each in inside.split(",")]


def _numbers(pattern: tuple[str, ...], components: list[str]) -> list[int] | None:
    """The numbers in place of ``*`` if components start with a pattern; otherwise None."""
    if len(components) < len(pattern):
        return None
    numbers = []
    for want, has in zip(pattern, components, strict=False):
        if want == "*" and has.isdigit():
            numbers.append(int(has))
        elif want != has:
            return None
    return numbers


def _filled(name: str, numbers: list[int]) -> str:
    left = iter(numbers)
    return re.sub(r"\*(\+1)?", lambda match: str(next(left) + bool(match[1])), name)
