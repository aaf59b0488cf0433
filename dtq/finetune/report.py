# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning method with its knobs, and the result of each block."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class FinetuneConfig:
    """A method and its knobs, see :mod:`dtq.finetune.methods`."""

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
    """The result of one block.

    Attributes:
        name: dotted path.
        before: relative squared error of its outputs on the held-out calls, summed over outputs.
        after: the same with the trained parameters, whether or not they were accepted.
        accepted: whether the trained parameters were kept.
        note: why not, when the error is not the reason.

    An error that is not a finite number is None.
    """

    name: str
    before: float | None
    after: float | None
    accepted: bool
    note: str = ""


@dataclass
class FinetuneReport:
    """The results of all blocks, in the order in which they run."""

    method: str
    blocks: list[BlockReport] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
