# SPDX-License-Identifier: Apache-2.0
"""A method with its knobs, and how each block came out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class FinetuneConfig:
    """A method and its knobs."""

    method: str
    steps: int
    lr: float
    lr_other: float
    clip: float
    seed: int
    candidates: int = 0
    lr_logits: float = 0.0
    ratio_penalty: float = 0.0


@dataclass
class BlockReport:
    """How one block came out.

    Attributes:
        name: dotted path.
        before: relative squared error of its outputs on the judging calls, summed over outputs.
        after: the same with the trained parts, whether or not they were accepted.
        accepted: whether they were.
        note: why not, when it is not the error.

    An error that is not a finite number is None.
    """

    name: str
    before: float | None
    after: float | None
    accepted: bool
    note: str = ""


@dataclass
class FinetuneReport:
    """How every block came out, in the order in which they run."""

    method: str
    blocks: list[BlockReport] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
