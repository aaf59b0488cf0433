# SPDX-License-Identifier: Apache-2.0
"""What was chosen for every item within a budget, and reading a budget as one writes it."""

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
    """What became of one item."""

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
        budget: bytes that were allowed.
        bytes: that are used.
        sensitivity: predicted: the sum over items, as if errors added up.
        lowest: the smallest choice there is, within the bounds of groups if there are any.
        highest: the cheapest choice of least damage, within the same.
    """

    rows: tuple[AllocationRow, ...]
    budget: int
    bytes: int
    sensitivity: float
    lowest: Option
    highest: Option

    HEAD = ("item", "group", "option", "bytes", "bits", "sensitivity")

    @property
    def choice(self) -> dict[str, str]:
        """Item to the name of its option."""
        return {row.item: row.option for row in self.rows}

    def table(self) -> list[tuple[str, ...]]:
        """The rows as text, under ``HEAD``."""
        return [
            (r.item, r.group, r.option, str(r.bytes), f"{r.bits:.2f}", f"{r.sensitivity:.1e}")
            for r in self.rows
        ]

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
    """The best options within a budget.

    Args:
        measured: from :func:`measure`. An option may be added with every metric zero: the layer
            as it is.
        costs: bytes of each item under each measured option.
        budget: bytes for all items together.
        groups: item to a key of ``METRICS``, see :func:`groups_of`.
        weights: how many each item has.
        per_group_metric: see :func:`sensitivities`.
        bounds: least and most bytes of some groups.

    Raises:
        InputError: see :func:`knapsack`.
    """
    hurts = sensitivities(measured, groups, per_group_metric=per_group_metric)
    tables = {
        item: [Option(o, costs[item][o], damage) for o, damage in options.items()]
        for item, options in hurts.items()
    }
    front, names = pareto_front(tables, bounds or {}, groups, LIMIT)
    best = affordable(front, budget, sum(weights[item] for item in tables))
    lowest, chosen, highest = (pick(tables, front, names, at) for at in (0, best, -1))
    rows = tuple(
        AllocationRow(i, groups[i], o.name, o.cost, 8 * o.cost / weights[i], o.sensitivity)
        for i, o in chosen.items()
    )
    whole = _sum("chosen", chosen)
    return Allocation(
        rows,
        budget,
        whole.cost,
        whole.sensitivity,
        _sum("lowest", lowest),
        _sum("highest", highest),
    )


def _sum(name: str, chosen: Mapping[str, Option]) -> Option:
    options = chosen.values()
    return Option(name, sum(o.cost for o in options), sum(o.sensitivity for o in options))


UNITS = {
    f"{prefix}{i}b": base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for i, base in (("", 1000), ("i", 1024))
}


def parse_size(text: str) -> int:
    """Bytes of ``8GB`` (10^9 each) or ``1.5GiB`` (2^30).

    Raises:
        InputError: it is no size.
    """
    if not re.fullmatch(r"[\d.]+\s*[a-z]+", text.strip().lower()):
        raise InputError(f"size {text!r}: write 8GB or 1.5GiB")
    return parse_budget(text, 0)


def parse_budget(text: str, weights: int) -> int:
    """Bytes of a budget as one writes it.

    Args:
        text: bits per weight, ``4.8``, or a size, ``12MB`` (10^6 bytes) or ``1.5GiB`` (2^30).
        weights: how many weights share a budget in bits.

    Raises:
        InputError: it is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", text.strip().lower())
    example = "write bits per weight, 4.8, or a size, 12MB or 1.5GiB"
    if not found or (found[2] and found[2] not in UNITS):
        raise InputError(f"budget {text!r}: {example}")
    number = Fraction(found[1])
    if not found[2] and not 0 < number <= 32:
        raise InputError(f"budget {text!r} is not between 0 and 32 bits per weight; {example}")
    count = math.floor(number * UNITS[found[2]] if found[2] else number * weights / 8)
    if not count:
        raise InputError(f"budget {text!r} is less than a byte; {example}")
    return count
