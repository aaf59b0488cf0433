# SPDX-License-Identifier: Apache-2.0
"""Choose an option for every item within a budget, and parse a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from dtq.allocate.knapsack import LIMIT, Option, ParetoFront, affordable, pareto_front, pick
from dtq.errors import InputError


@dataclass(frozen=True)
class AllocationRow:
    """The choice for one item.

    Attributes:
        item: name of an input group.
        group: key of ``METRICS`` that ranks it, or the component that it belongs to.
        option: name of the chosen option.
        bytes: stored bytes.
        bits: stored bits per weight.
        sensitivity: relative squared error that it adds to the output.
    """

    item: str
    group: str
    option: str
    bytes: int
    bits: float
    sensitivity: float


@dataclass(frozen=True)
class Allocation:
    """A choice for every item.

    Attributes:
        rows: one per item.
        budget: bytes that are allowed.
        bytes: bytes that are used.
        sensitivity: predicted relative squared error of the output: the sum over items.
        lowest: the smallest choice there is.
        highest: the cheapest choice of the lowest sensitivity.
    """

    rows: tuple[AllocationRow, ...]
    budget: int
    bytes: int
    sensitivity: float
    lowest: Option
    highest: Option

    @property
    def choice(self) -> dict[str, str]:
        """Item to the name of its option."""
        return {row.item: row.option for row in self.rows}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def choose(
    sensitivity: Mapping[str, Mapping[str, float]],
    costs: Mapping[str, Mapping[str, int]],
    budget: int,
    *,
    groups: Mapping[str, str],
    weights: Mapping[str, int],
    total: Callable[[Mapping[str, str]], int] | None = None,
) -> Allocation:
    """Choose one option per item, with the lowest sum of sensitivities within a budget.

    Args:
        sensitivity: item, option to the error that it adds, from :func:`sensitivities`. An option
            may be added with the error 0: the unquantized layer.
        costs: bytes of each item under each option.
        budget: bytes.
        groups: item to the name of its group, for the rows.
        weights: number of weights of each item.
        total: bytes of a choice (item to option) that count for the budget. Default: the sum of the
            costs. It may add what the choice changes little, such as headers of files.

    Returns:
        The allocation; its ``bytes`` are those of ``total``.

    Raises:
        InputError: there is no such choice, see :func:`knapsack`.
    """
    tables = {
        item: [Option(o, costs[item][o], s) for o, s in options.items()]
        for item, options in sensitivity.items()
    }
    front = pareto_front(tables, LIMIT)
    lowest, highest = (pick(tables, front, index) for index in (0, -1))
    if total is None:
        index = affordable(front, budget, sum(weights[i] for i in tables))
        chosen = pick(tables, front, index)
        used = _sum("chosen", chosen).cost
    else:
        chosen, used = _within_total(tables, front, budget, total)
    rows = tuple(
        AllocationRow(i, groups[i], o.name, o.cost, 8 * o.cost / weights[i], o.sensitivity)
        for i, o in chosen.items()
    )
    ends = _sum("lowest", lowest), _sum("highest", highest)
    return Allocation(rows, budget, used, _sum("chosen", chosen).sensitivity, *ends)


def _within_total(
    tables: Mapping[str, Sequence[Option]],
    front: ParetoFront,
    budget: int,
    total: Callable[[Mapping[str, str]], int],
) -> tuple[dict[str, Option], int]:
    """The last point of a front whose ``total`` is within the budget, found from above.

    A point is passed over without asking for its ``total`` only where that would be above the
    budget with the least that the ``total`` of any point so far, both ends of the front among
    them, had added to its cost.
    """
    costs = front.points[:, 0]

    def at(index: int) -> tuple[dict[str, Option], int]:
        chosen = pick(tables, front, index)
        return chosen, total({item: option.name for item, option in chosen.items()})

    last = len(costs) - 1
    added = min(at(index)[1] - int(costs[index]) for index in {0, last})
    index = last
    while True:
        fitting = int(np.searchsorted(costs, budget - added, side="right")) - 1
        index = max(0, min(index, fitting))
        chosen, used = at(index)
        if used <= budget:
            return chosen, used
        if not index:
            raise InputError(
                f"a budget of {budget} bytes is too small: the smallest choice takes {used} bytes"
            )
        added = min(added, used - int(costs[index]))
        index -= 1


def _sum(name: str, chosen: Mapping[str, Option]) -> Option:
    options = chosen.values()
    return Option(name, sum(o.cost for o in options), sum(o.sensitivity for o in options))


UNITS = {
    f"{prefix}{i}b": base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for i, base in (("", 1000), ("i", 1024))
}
"""Bytes of a unit, in lower case."""


def parse_size(text: str) -> int:
    """Bytes of ``8GB`` (10^9 each) or ``1.5GiB`` (2^30).

    Raises:
        InputError: it is no size.
    """
    if not re.fullmatch(r"[\d.]+\s*[a-z]+", text.strip().lower()):
        raise InputError(f"size {text!r}: write 8GB or 1.5GiB")
    return parse_budget(text, 0)


def parse_budget(text: str, weights: int) -> int:
    """Bytes of a budget.

    Args:
        text: bits per weight, ``4.8``, or a size, ``12MB`` (10^6 bytes) or ``1.5GiB`` (2^30).
        weights: number of weights that share a budget in bits.

    Returns:
        Bytes, rounded down.

    Raises:
        InputError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", text.strip().lower())
    example = "write bits per weight, 4.8, or a size, 12MB or 1.5GiB"
    if not match or (match[2] and match[2] not in UNITS):
        raise InputError(f"budget {text!r}: {example}")
    number = Fraction(match[1])
    if not match[2] and not 0 < number <= 32:
        raise InputError(f"budget {text!r} is not between 0 and 32 bits per weight; {example}")
    count = math.floor(number * UNITS[match[2]] if match[2] else number * weights / 8)
    if not count:
        raise InputError(f"budget {text!r} is less than a byte; {example}")
    return count
