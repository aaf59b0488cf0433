# SPDX-License-Identifier: Apache-2.0
"""Input transforms: ``TRANSFORMS`` lists the methods that choose one, and what each needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from dtq.linalg.hadamard import block_for, regular_block_for
from dtq.transforms import grid_search, methods
from dtq.transforms.base import OnlineTransform
from dtq.transforms.choice import TransformChoice


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        call: the function, see ``dtq.transforms.methods`` for its signature.
        needs: names of the statistics that calibration must collect for it.
        rotates: whether it may rotate the input, with a Hadamard transform over blocks.
        block_for: gives the block of a width K, from K and the largest block.
    """

    call: Callable[..., TransformChoice]
    needs: frozenset[str] = frozenset()
    rotates: bool = False
    block_for: Callable[[int, int], int] = block_for

    @property
    def largest_block(self) -> int:
        """Default of the knob ``block`` of a method that rotates."""
        default: int = inspect.signature(self.call).parameters["block"].default
        return default


TRANSFORMS: dict[str, Method] = {
    "none": Method(methods.none),
    "smooth": Method(methods.smooth, frozenset({"channels"})),
    "hadamard": Method(methods.hadamard, rotates=True),
    "convrot": Method(methods.convrot, rotates=True, block_for=regular_block_for),
    "smooth-hadamard": Method(methods.smooth_hadamard, frozenset({"channels"}), rotates=True),
    "ditas": Method(methods.ditas, frozenset({"channels", "sample"})),
    "ars": Method(methods.ars, frozenset({"channels", "sample"}), rotates=True),
    "search": Method(grid_search.search, frozenset({"channels", "sample"}), rotates=True),
}

__all__ = ["TRANSFORMS", "Method", "OnlineTransform", "TransformChoice"]
