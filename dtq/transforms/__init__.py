# SPDX-License-Identifier: Apache-2.0
"""``TRANSFORMS``: the ways to choose a transform, and the statistics each one needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dtq.transforms import methods
from dtq.transforms.base import (
    Chain,
    Diagonal,
    Online,
    Permutation,
    Rotation,
    Transform,
)
from dtq.transforms.methods import Choice


@dataclass(frozen=True)
class Method:
    """A row of the table: the function, and what calibration must collect for it."""

    call: Callable[..., Choice]
    needs: frozenset[str] = frozenset()


TRANSFORMS: dict[str, Method] = {
    "none": Method(methods.none),
    "smooth": Method(methods.smooth, frozenset({"channels"})),
    "hadamard": Method(methods.hadamard),
    "smooth-hadamard": Method(methods.smooth_hadamard, frozenset({"channels"})),
    "ditas": Method(methods.ditas, frozenset({"channels", "reservoir"})),
    "ars": Method(methods.ars, frozenset({"channels", "reservoir"})),
    "search": Method(methods.search, frozenset({"channels", "reservoir"})),
}

__all__ = [
    "TRANSFORMS",
    "Chain",
    "Choice",
    "Diagonal",
    "Method",
    "Online",
    "Permutation",
    "Rotation",
    "Transform",
]
