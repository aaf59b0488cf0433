# SPDX-License-Identifier: Apache-2.0
"""The multiple-choice knapsack: one option per item, by the Pareto front of cost and error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtq.errors import InputError


@dataclass(frozen=True)
class Option:
    """One way to store an item.

    Attributes:
        name: of the option.
        cost: bytes.
        sensitivity: relative squared error that it adds to the output.
    """

    name: str
    cost: int
    sensitivity: float


LIMIT = 16384
"""Largest number of points of a Pareto front. With 200 random items of five options, the total
sensitivity is within 0.1 % of the linear relaxation, a lower bound, and the front takes a second
(``tests/allocate/test_allocation.py``)."""


def knapsack(
    tables: Mapping[str, Sequence[Option]],
    budget: int,
    *,
    weights: int = 0,
    limit: int = LIMIT,
) -> dict[str, Option]:
    """Choose one option per item, together within the budget, with the lowest total sensitivity.

    The Pareto front of all (cost, sensitivity) sums is built item by item (Nemhauser & Ullmann,
    1969). A front longer than ``limit`` is thinned. The vertices of its lower convex hull stay,
    which are the points that greedy upgrades by sensitivity per byte would visit, and of the others
    the nearest to the hull in each of ``limit`` ranges of cost. So:

    * up to ``limit`` sums the choice is the optimum, and the cheapest one of equal sensitivity;
    * beyond, it is at least as good as greedy: optimal up to one upgrade of one item;
    * the front does not depend on the budget, so a larger budget is never worse.

    Options of infinite sensitivity are never chosen.

    Args:
        tables: the options of each item, in any order.
        budget: bytes.
        weights: number of weights in all items, for messages in bits. 0: messages in bytes only.
        limit: largest number of points of a front.

    Returns:
        Item to its option.

    Raises:
        InputError: the budget is too small (the message has the smallest one), or an item has no
            option of finite sensitivity.
    """
    front = pareto_front(tables, limit)
    return pick(tables, front, affordable(front, budget, weights))


class ParetoFront(NamedTuple):
    """Sums of cost and sensitivity that some items can come to, by rising cost.

    Sums that another one beats are left out, except those of one item alone.

    Sensitivities are whole multiples of 2^-60 of the largest sum. Their addition is exact in any
    order, so equal sums compare equal.

    Attributes:
        points: cost and sensitivity of each sum, (S, 2).
        hull: vertices of the lower convex hull, collinear ones too, (V, 2).
        picks: index of the option of each item, in the order of the items, (S, items).
    """

    points: NDArray[np.int64]
    hull: NDArray[np.int64]
    picks: NDArray[np.int16]


def _finite(options: Sequence[Option]) -> list[Option]:
    return [option for option in options if math.isfinite(option.sensitivity)]


def pareto_front(tables: Mapping[str, Sequence[Option]], limit: int) -> ParetoFront:
    """The Pareto front of all items.

    Args:
        tables: the options of each item, in any order.
        limit: largest number of points of the front.

    Returns:
        The front.

    Raises:
        InputError: an item has no option of finite sensitivity.
    """
    if broken := [item for item, options in tables.items() if not _finite(options)]:
        raise InputError(
            f"{', '.join(broken)}: no option gives finite outputs; "
            f"add a wider format, or exclude them"
        )
    usable = {item: _finite(options) for item, options in tables.items()}
    largest = sum(max(abs(o.sensitivity) for o in options) for options in usable.values())
    unit = max(largest, 1e-200) / 2**60
    singles = [
        _single([(o.cost, round(o.sensitivity / unit)) for o in options])
        for options in usable.values()
    ]
    start = _single([(0, 0)])._replace(picks=np.empty((1, 0), np.int16))
    return reduce(lambda front, single: _add(front, single, limit), singles, start)


def _single(points: Sequence[tuple[int, int]]) -> ParetoFront:
    perm = sorted(range(len(points)), key=lambda i: points[i])
    array = np.array([points[i] for i in perm], np.int64).reshape(-1, 2)
    return ParetoFront(array, _hull(array), np.array(perm, np.int16).reshape(-1, 1))


def _hull(points: NDArray[np.int64]) -> NDArray[np.int64]:
    """Vertices from the lowest cost to the lowest sensitivity, with slopes that rise to zero."""
    chain: list[tuple[int, int]] = []
    for x, y in points.tolist():
        if chain and y >= chain[-1][1]:
            continue
        while len(chain) > 1 and _above(chain[-2], chain[-1], (x, y)):
            chain.pop()
        chain.append((x, y))
    return np.array(chain, np.int64)


def _above(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) > (c[1] - a[1]) * (b[0] - a[0])


def _add(a: ParetoFront, b: ParetoFront, limit: int) -> ParetoFront:
    """Sums of a point of ``a`` and a point of ``b``."""
    points = (a.points[:, None] + b.points).reshape(-1, 2)
    order = np.lexsort((points[:, 1], points[:, 0]))
    lowest = np.minimum.accumulate(points[order, 1])
    order = order[np.r_[True, lowest[1:] < lowest[:-1]]]
    edges = np.concatenate([np.diff(a.hull, axis=0), np.diff(b.hull, axis=0)])
    edges = edges[np.argsort(edges[:, 1] / edges[:, 0], kind="stable")]
    hull = np.cumsum(np.concatenate([a.hull[:1] + b.hull[:1], edges]), axis=0)
    order = order[_thin(points[order], hull, limit)]
    i, j = np.divmod(order, len(b.points))
    return ParetoFront(points[order], hull, np.hstack([a.picks[i], b.picks[j]]))


def _thin(points: NDArray[np.int64], hull: NDArray[np.int64], limit: int) -> NDArray[np.intp]:
    """Indices of the points to keep: those of the hull, and the nearest to it in each cost bin."""
    cost, sensitivity = points.T
    if len(points) <= limit:
        return np.arange(len(points))
    gap = sensitivity - np.interp(cost, hull[:, 0], hull[:, 1])
    cost_bin = (cost - cost[0]) * limit // (cost[-1] - cost[0] + 1)
    order = np.lexsort((gap, cost_bin))
    nearest = order[np.unique(cost_bin[order], return_index=True)[1]]
    vertices = np.searchsorted(cost, hull[:, 0], side="right") - 1
    return np.union1d(nearest, vertices)


def affordable(front: ParetoFront, budget: int, weights: int) -> int:
    """Index of the last point within the budget.

    Raises:
        InputError: there is none.
    """
    best = int(np.searchsorted(front.points[:, 0], budget, side="right")) - 1
    if best < 0:
        least = int(front.points[0, 0])
        raise InputError(
            f"a budget of {_amount(budget, weights, math.floor)} is too small: these options need "
            f"at least {_amount(least, weights, math.ceil)}. Raise it, or allow narrower formats"
        )
    return best


def pick(
    tables: Mapping[str, Sequence[Option]], front: ParetoFront, index: int
) -> dict[str, Option]:
    """The options of a point of a front.

    Args:
        tables: the options of each item, as the front was built from.
        front: from :func:`pareto_front`.
        index: of the point.

    Returns:
        Item to its option.
    """
    picks = zip(tables.items(), front.picks[index].tolist(), strict=True)
    return {item: _finite(options)[picked] for (item, options), picked in picks}


def _amount(count: int, weights: int, toward: Callable[[Fraction], int]) -> str:
    if not weights:
        return f"{count} bytes"
    bits = toward(Fraction(8000 * count, weights)) / 1000
    return f"{count} bytes ({bits:.3f} bits per weight)"
