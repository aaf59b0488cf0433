# SPDX-License-Identifier: Apache-2.0
"""One exception family: each message says what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable


class DtqError(Exception):
    """Base of everything dtq raises on purpose. The command line prints it as one line."""


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


class TeamError(DtqError):
    """Another process of the run died, or does not answer."""
