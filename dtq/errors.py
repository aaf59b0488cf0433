# SPDX-License-Identifier: Apache-2.0
"""The exceptions of dtq. Each message says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from safetensors import SafetensorError

LIBRARY_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    MemoryError,
    SafetensorError,
)
"""What libraries raise for a file that they cannot read. Where dtq passes a file from outside to a
library, it converts these to a :class:`DtqError` that names the file; the original is its cause."""


LONGEST = 4000
"""Maximum length of a message, in characters."""


class DtqError(Exception):
    """Base of everything that dtq raises on purpose. The command line prints it as one line.

    Messages quote files, and a file may hold anything. Long messages are cut, and characters that
    control a terminal are escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return printable(text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")


class InputError(DtqError):
    """The user gave a path, a name or a value that cannot be used."""


class RecipeError(DtqError):
    """A recipe cannot be read or does not fit the model.

    Args:
        where: the file or the name of the recipe.
        problems: every mistake in it, one sentence each.
    """

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(f"{where}: {len(self.problems)} problem(s)\n{lines}")


class CheckpointError(DtqError):
    """A checkpoint is damaged, incomplete, or from a newer dtq; names the file and the key."""


class WorkerError(DtqError):
    """Another process of the run died, or does not respond."""


class NonFiniteError(DtqError):
    """A model computed NaN or infinite values; names the layer and the step."""


def printable(text: str) -> str:
    """The text with escapes in place of characters that control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def hint(name: str, known: Iterable[str], otherwise: str, count: int = 3, like: float = 0.5) -> str:
    """The end of a message about an unknown name: known names that are like it, or ``otherwise``.

    Args:
        name: as the user gave it.
        known: names to choose from.
        otherwise: the result if none of them is like it.
        count: largest number of suggestions.
        like: smallest similarity, 0 to 1.
    """
    near = difflib.get_close_matches(name, list(known), count, like)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """An error of a library in one line: its class and the first line of its message."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
