# SPDX-License-Identifier: Apache-2.0
"""One exception family: each message says what is wrong and what to do about it."""

from __future__ import annotations

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
"""What libraries raise over a file that they can make nothing of. Where a file of others goes into
one, these become a :class:`DtqError` that names the file; the original is its cause."""


LONGEST = 4000
"""Characters of a message."""


class DtqError(Exception):
    """Base of everything dtq raises on purpose. The command line prints it as one line.

    Messages quote files, and files may hold anything: what is long is cut, and what would steer a
    terminal is written as its escape.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return printable(text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")


class InputError(DtqError):
    """The user gave a path, a name or a value that cannot be used."""


class RecipeError(DtqError):
    """A recipe that cannot be read or does not fit the model; carries every mistake at once."""

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(f"{where}: {len(self.problems)} problem(s)\n{lines}")


class CheckpointError(DtqError):
    """A checkpoint that is damaged, incomplete, or from a newer dtq; names the file and the key."""


class WorkerError(DtqError):
    """Another process of the run died, or does not answer."""


class NonFiniteError(DtqError):
    """NaN or infinite numbers where a model runs; names the layer and the step."""


def printable(text: str) -> str:
    """The text with escapes in place of what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """An error of a library in one line: its kind and the first line of what it says."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__
