# SPDX-License-Identifier: Apache-2.0
"""Which layers a selector of a recipe, or an entry of ``modules_to_not_convert``, stands for."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from torch import nn

from dtq.errors import InputError, hint
from dtq.models import ROLES, Linear


def matches(selector: str, linear: Linear) -> bool:
    """Whether a role, or a glob on names, stands for a linear."""
    return any(fnmatch.fnmatchcase(text, selector) for text in (linear.role, linear.name))


def is_role(selector: str) -> bool:
    """Whether a selector stands for roles, which some models have no layer of."""
    return any(fnmatch.fnmatchcase(role, selector) for role in ROLES)


def excludes(pattern: str, name: str) -> bool:
    """Whether an entry of ``modules_to_not_convert`` stands for the layer of a name.

    Args:
        pattern: a name, a prefix or a path component, each also as a glob; the name of a parameter,
            which stands for its layer; or ``re:`` and a regular expression.
        name: dotted name of a layer.

    Raises:
        InputError: the regular expression cannot be read.
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise InputError(f"{pattern!r} is not a regular expression: {error}") from error
    layer = re.sub(r"\.(weight|bias)$", "", pattern)
    whole = any(fnmatch.fnmatchcase(name, glob) for glob in (pattern, layer, f"{layer}.*"))
    return whole or any(fnmatch.fnmatchcase(part, pattern) for part in name.split("."))


def pattern_list(given: object, where: str) -> tuple[str, ...]:
    """Entries of ``modules_to_not_convert``; one string is one entry, None is none.

    Args:
        given: as the user gave it.
        where: name of the argument.

    Raises:
        InputError: it is not a string or a collection of strings.
    """
    items = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(items, Iterable) or not all(isinstance(item, str) for item in items):
        raise InputError(f"{where}: expected names of layers, got {given!r}"[:300])
    return tuple(items)


def check_patterns(patterns: Iterable[str], models: Iterable[nn.Module], where: str) -> None:
    """Refuse entries that stand for nothing in any of the models of a pipeline.

    An entry for a module or a parameter that is never quantized is none of those.

    Args:
        patterns: entries of ``modules_to_not_convert``.
        models: the transformers.
        where: name of the argument.

    Raises:
        InputError: names every such entry, with names that are like it.
    """
    if not (patterns := list(patterns)):
        return
    names = dict.fromkeys(
        name
        for model in models
        for named in (model.named_modules(), model.named_parameters(), model.named_buffers())
        for name, _ in named
        if name
    )
    known = [*dict.fromkeys(part for name in names for part in name.split(".")), *names]
    unused = [p for p in patterns if not any(excludes(p, name) for name in names)]
    if unused:
        words = hint(unused[0], known, "dtq plan MODEL --all lists the layers")
        verb = "matches" if len(unused) == 1 else "match"
        raise InputError(f"{where}: {', '.join(map(repr, unused))} {verb} no layer; {words}")
