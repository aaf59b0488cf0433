# SPDX-License-Identifier: Apache-2.0
"""Choose an option for every item within a budget, and parse a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from dtq.allocate.knapsack import LIMIT, Bounds, Option, affordable, pareto_front, pick
from dtq.allocate.measure import sensitivities
from dtq.errors import InputError


@dataclass(frozen=True)
class AllocationRow:
    """The choice for one item.

    Attributes:
        item: name of an input group.
        group: key of ``METRICS`` that ranks it.
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
        lowest: the smallest choice there is, within the bounds of groups if there are any.
        highest: the cheapest choice of the lowest sensitivity, within the same bounds.
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


def allocate(
    measured: Mapping[str, Mapping[str, Mapping[str, float]]],
    costs: Mapping[str, Mapping[str, int]],
    budget: int,
    *,
    groups: Mapping[str, str],
    weights: Mapping[str, int],
    per_group_metric: bool = True,
    bounds: Bounds | None = None,
) -> Allocation:
    """Choose the options of the lowest total sensitivity within a budget.

    Args:
        measured: item, option, metric to error, from :func:`measure`. An option may be added with
            every metric zero: the unquantized layer.
        costs: bytes of each item under each measured option.
        budget: bytes for all items together.
        groups: item to a key of ``METRICS``, from :func:`groups_of`.
        weights: number of weights of each item.
        per_group_metric: rank the items of a group by its metric, see :func:`sensitivities`.
        bounds: lowest and highest bytes of some groups.

    Returns:
        The allocation.

    Raises:
        InputError: there is no such choice, see :func:`knapsack`.
    """
    sensitivity = sensitivities(measured, groups, per_group_metric=per_group_metric)
    tables = {
        item: [Option(o, costs[item][o], s) for o, s in options.items()]
        for item, options in sensitivity.items()
    }
    front, names = pareto_front(tables, bounds or {}, groups, LIMIT)
    best = affordable(front, budget, sum(weights[item] for item in tables))
    lowest, chosen, highest = (pick(tables, front, names, index) for index in (0, best, -1))
    rows = tuple(
        AllocationRow(i, groups[i], o.name, o.cost, 8 * o.cost / weights[i], o.sensitivity)
        for i, o in chosen.items()
    )
    total = _sum("chosen", chosen)
    ends = _sum("lowest", lowest), _sum("highest", highest)
    return Allocation(rows, budget, total.cost, total.sensitivity, *ends)


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
