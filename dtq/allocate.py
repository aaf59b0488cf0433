# SPDX-License-Identifier: Apache-2.0
"""Mixed precision under a budget: measure what each option does to the output, choose the best.

After ViDiT-Q's metric-decoupled mixed precision (2406.02540, sec. 3.4): layers fall into groups by
the quality aspect that they control, a group's layers are ranked by that group's metric, and the
plain error of the output divides the budget among the groups. The paper judges generated pictures
with CLIPScore, DOVER and an optical-flow score and spends the bits by hand. Ours, not the paper's:
proxies that read the transformer's output alone, a solver instead of the hand, bytes instead of
bits, and one choice for all timesteps, because a second copy of a weight would cost what the first
one saves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import reduce
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from dtq.errors import InputError
from dtq.families import ROLES, Site

# --- metrics ---------------------------------------------------------------------------------

Metric = Callable[[Tensor, Tensor], float]
"""``(want, got) -> damage >= 0`` on two outputs of the transformer, infinite if not finite.

Pictures are (B, C, H, W), videos (B, C, F, H, W), packed latents (B, T, C); the tokens of the last
are taken as a line.
"""


def mse(want: Tensor, got: Tensor) -> float:
    """Relative squared error ``|got - want|^2 / |want|^2``."""
    return _relative(want, got, want)


def content(want: Tensor, got: Tensor) -> float:
    """Error of the low frequencies: of moving averages over 4 x 4 pixels, or 4 tokens."""
    return _relative(_low(want), _low(got), want)


def fidelity(want: Tensor, got: Tensor) -> float:
    """Error of the high frequencies: of the differences between neighbours."""
    if all(want.shape[axis] == 1 for axis in _axes(want)):
        return mse(want, got)
    return _relative(_slopes(want), _slopes(got), want)


def temporal(want: Tensor, got: Tensor) -> float:
    """Error of the differences between frames; ``fidelity`` where there are none."""
    if want.ndim != 5 or want.shape[2] == 1:
        return fidelity(want, got)
    return _relative(want.double().diff(dim=2), got.double().diff(dim=2), want)


def text(want: Tensor, got: Tensor) -> float:
    """Error of the guidance direction: of one half of the batch less the other.

    Both its angle and its length count, since the sampler multiplies it by the guidance scale.
    ``content`` where the batch has no halves.
    """
    if len(want) % 2:
        return content(want, got)
    (a, b), (c, d) = want.double().chunk(2), got.double().chunk(2)
    return _relative(a - b, c - d, want)


METRICS: dict[str, Metric] = {
    "mse": mse,
    "content": content,
    "fidelity": fidelity,
    "temporal": temporal,
    "text": text,
}

GROUPS: dict[str, str] = {
    **{role: "text" for role in ROLES if role.startswith("xattn.")},
    **{role: "fidelity" for role in ROLES if role.startswith(("attn.", "ffn."))},
    **dict.fromkeys(("adaln", "embed", "head"), "content"),  # they touch every token alike
    "other": "mse",
}
"""The metric that ranks the layers of a role (ours, for the paper's metrics see the module)."""


def groups_of(sites: Iterable[Site]) -> dict[str, str]:
    """The metric of each site, by the role of its first linear and by name for attention in time.

    Returns:
        Name of a site to a key of ``METRICS``.
    """
    first = {site.name: site.linears[0] for site in sites}
    return {
        name: "temporal"
        if "temporal" in linear.name and linear.role.startswith("attn.")
        else GROUPS[linear.role]
        for name, linear in first.items()
    }


def _relative(want: Tensor, got: Tensor, whole: Tensor) -> float:
    """Mean squared error over the mean square of ``want``, a part of ``whole``.

    A part without energy, such as the differences of still frames, counts as a millionth of the
    whole: its damage is large then, not infinite.
    """
    want, got, whole = want.double(), got.double(), whole.double()
    scale = torch.maximum(want.square().mean(), 1e-6 * whole.square().mean()).clamp(min=1e-300)
    error = float((got - want).square().mean() / scale)
    return error if math.isfinite(error) else math.inf


def _axes(x: Tensor) -> tuple[int, ...]:
    return (1,) if x.ndim == 3 else (-2, -1)


def _low(x: Tensor) -> Tensor:
    x = x.double()
    for axis in _axes(x):
        x = x.unfold(axis, min(4, x.shape[axis]), 1).mean(-1)
    return x


def _slopes(x: Tensor) -> Tensor:
    return torch.cat([x.double().diff(dim=axis).flatten() for axis in _axes(x)])


# --- measuring -------------------------------------------------------------------------------

Measured = dict[str, dict[str, dict[str, float]]]
"""Item, option, metric to damage."""


class Recorded(Protocol):
    """A call of the float model: ``dtq.evaluate.drift.Recorded`` is one."""

    @property
    def args(self) -> tuple[Any, ...]: ...
    @property
    def kwargs(self) -> dict[str, Any]: ...
    @property
    def output(self) -> Tensor: ...


@torch.no_grad()
def measure(
    model: nn.Module,
    calls: Sequence[Recorded],
    candidates: Mapping[str, Mapping[str, Mapping[str, nn.Module]]],
    *,
    progress: bool = True,
) -> Measured:
    """Damage of each option of each item alone, everything else float, on the same inputs.

    Args:
        model: the float model, in evaluation mode; it is as before afterwards, also on errors.
        calls: what it was given and what it gave. Two in a row with the same latents are taken as
            the two halves of guidance.
        candidates: item, option, layer name to the module that stands in for the float linear, on
            the model's device. Each option is looked up once, so the mappings may build it then.
        progress: show a progress bar.

    Returns:
        Every metric, averaged over the calls; infinite where an output was not finite.
    """
    assert calls, "nothing was recorded"
    moments = _moments(calls)
    device = next(model.parameters()).device
    total = len(calls) * sum(len(options) for options in candidates.values())
    measured: Measured = {}
    with tqdm(
        total=total, desc="measure", unit="call", disable=not progress, dynamic_ncols=True
    ) as bar:
        for item, options in candidates.items():
            measured[item] = {}
            for option, modules in options.items():
                with _swapped(model, modules):
                    found = []
                    for moment in moments:
                        got = [_run(model, call, device) for call in moment]
                        found.append(_compare(moment, got))
                        bar.update(len(moment))
                measured[item][option] = {
                    name: sum(each[name] for each in found) / len(found) for name in METRICS
                }
    return measured


@contextmanager
def _swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _run(model: nn.Module, call: Recorded, device: torch.device) -> Tensor:
    output = model(*send_to_device(call.args, device), **send_to_device(call.kwargs, device))
    first = output if isinstance(output, Tensor) else output[0]
    assert isinstance(first, Tensor)
    return first.cpu()


def _compare(moment: Sequence[Recorded], got: Sequence[Tensor]) -> dict[str, float]:
    latents = _latents(moment[0])
    half = len(latents) // 2
    guided = len(moment) == 2 or torch.equal(latents[:half], latents[half:])
    pair = torch.cat([call.output for call in moment]), torch.cat(list(got))
    chosen = METRICS if guided else METRICS | {"text": content}
    return {name: metric(*pair) for name, metric in chosen.items()}


def _moments(calls: Sequence[Recorded]) -> list[list[Recorded]]:
    """Calls one by one, but two in a row with the same latents together."""
    moments: list[list[Recorded]] = []
    for call in calls:
        last = moments[-1] if moments else []
        if len(last) == 1 and torch.equal(_latents(last[0]), _latents(call)):
            last.append(call)
        else:
            moments.append([call])
    return moments


def _latents(call: Recorded) -> Tensor:
    return next(v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor))


def damages(
    measured: Mapping[str, Mapping[str, Mapping[str, float]]],
    groups: Mapping[str, str],
    *,
    decoupled: bool = True,
) -> dict[str, dict[str, float]]:
    """One number per item and option, in units of the output's relative squared error.

    Decoupled, for item i in group g and option o, m being the metric of g::

        d(i, o) = M_g(o) * m(i, o) / sum_{j in g} m(j, o),    M_g(o) = sum_{j in g} mse(j, o)

    The metric ranks the items inside a group and cannot move anything between groups; what a
    group loses altogether is its plain error, as if errors of layers added up. ViDiT-Q quantizes
    each group at once for that (2406.02540, sec. 3.4); the sum over layers is ours, it needs no
    forwards of its own. Where a metric sees nothing in a whole group, ``mse`` stands in for it.

    Args:
        measured: from :func:`measure`; options mean the same for every item.
        groups: item to a key of ``METRICS``.
        decoupled: otherwise ``d = mse``.

    Returns:
        Item, option to damage, infinite where an output was not finite.
    """
    plain = {i: {o: m["mse"] for o, m in options.items()} for i, options in measured.items()}
    if not decoupled:
        return plain
    ranks = {i: {o: m[groups[i]] for o, m in options.items()} for i, options in measured.items()}
    whole: dict[tuple[str, str], float] = {}
    shares: dict[tuple[str, str], float] = {}
    for item, options in ranks.items():
        for option, rank in options.items():
            if math.isfinite(rank + plain[item][option]):
                key = groups[item], option
                whole[key] = whole.get(key, 0.0) + plain[item][option]
                shares[key] = shares.get(key, 0.0) + rank

    def damage(item: str, option: str) -> float:
        key, rank, error = (groups[item], option), ranks[item][option], plain[item][option]
        if not math.isfinite(rank + error):
            return math.inf
        return whole[key] * (rank / shares[key]) if shares[key] else error

    return {i: {o: damage(i, o) for o in options} for i, options in measured.items()}


# --- choosing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One way to keep an item: its cost in bytes, and what it does to the output."""

    name: str
    cost: int
    damage: float


Bounds = Mapping[str, tuple[int, int]]
"""Group to the least and the most bytes that its items may take together."""


LIMIT = 16384
"""Sums in a front. On 200 random items of five options the damage is within 0.1 % of the linear
relaxation, which nothing beats, and that takes a second (``tests/test_allocate.py``)."""


def knapsack(
    tables: Mapping[str, Sequence[Option]],
    budget: int,
    *,
    bounds: Bounds | None = None,
    group_of: Mapping[str, str] | None = None,
    weights: int = 0,
    limit: int = LIMIT,
) -> dict[str, Option]:
    """One option per item, together within the budget, with the least total damage.

    The front of all (cost, damage) sums is built item by item, keeping only sums that nothing
    beats (Nemhauser & Ullmann, 1969). A front longer than ``limit`` is thinned: the vertices of its
    lower convex hull stay, which are what greedy upgrades by damage per byte would visit, and of
    the others the nearest to the hull in each of ``limit`` ranges of cost. So:

    * up to ``limit`` sums the choice is the optimum, and the cheapest one of equal damage;
    * beyond, it is at least as good as greedy: optimal up to one upgrade of one item;
    * the front does not depend on the budget, so a larger budget never does more damage.

    Options of infinite damage are never chosen.

    Args:
        tables: the options of each item, in any order.
        budget: bytes.
        bounds: least and most bytes of some groups.
        group_of: the group of each item; items of other groups are free.
        weights: in all items, for messages in bits.
        limit: length of a front.

    Raises:
        InputError: the budget is too small, says what the smallest is; a group cannot be within
            its bounds; an item has no option of finite damage.
    """
    front, names = _front(tables, bounds or {}, group_of or {}, limit)
    return _pick(tables, front, names, _affordable(front, budget, weights))


class _Front(NamedTuple):
    """Sums that some items can come to, by rising cost.

    Damages are whole numbers of 2^-60 of the largest sum: adding them in another order gives the
    same, so that equal is equal.
    """

    points: NDArray[np.int64]  # (S, 2) cost, damage
    hull: NDArray[np.int64]  # (V, 2) vertices of the lower convex hull, those in a line too
    picks: NDArray[np.int16]  # (S, items) which option of each item


def _finite(options: Sequence[Option]) -> list[Option]:
    return [option for option in options if math.isfinite(option.damage)]


def _front(
    tables: Mapping[str, Sequence[Option]],
    bounds: Bounds,
    group_of: Mapping[str, str],
    limit: int,
) -> tuple[_Front, list[str]]:
    """The front of all items, and the items in the order of its picks."""
    if broken := [item for item, options in tables.items() if not _finite(options)]:
        raise InputError(
            f"{', '.join(broken)}: no option gives finite outputs; add a wider format, or keep them"
        )
    usable = {item: _finite(options) for item, options in tables.items()}
    largest = sum(max(abs(o.damage) for o in options) for options in usable.values())
    unit = max(largest, 1e-200) / 2**60
    singles = {
        item: _single([(o.cost, round(o.damage / unit)) for o in options])
        for item, options in usable.items()
    }
    start = _single([(0, 0)])._replace(picks=np.empty((1, 0), np.int16))
    names = [item for item in singles if group_of.get(item) not in bounds]
    front = reduce(lambda a, item: _add(a, singles[item], limit), names, start)
    for group, (least, most) in bounds.items():
        members = [item for item in singles if group_of.get(item) == group]
        spend = least > 0  # what is dominated may be what spends enough
        each = reduce(lambda a, item: _add(a, singles[item], limit, spend), members, start)
        front = _add(front, _within(each, group, least, most, max(1, limit // 8)), limit)
        names += members
    return front, names


def _single(points: Sequence[tuple[int, int]]) -> _Front:
    order = sorted(range(len(points)), key=lambda i: points[i])
    array = np.array([points[i] for i in order], np.int64).reshape(-1, 2)
    return _Front(array, _hull(array), np.array(order, np.int16).reshape(-1, 1))


def _hull(points: NDArray[np.int64]) -> NDArray[np.int64]:
    """From the cheapest point to the least damage, slopes rising towards zero."""
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


def _add(a: _Front, b: _Front, limit: int, dominated: bool = False) -> _Front:
    """Everything of ``a`` with everything of ``b``; ``dominated`` keeps one sum of every cost."""
    points = (a.points[:, None] + b.points).reshape(-1, 2)
    order = np.lexsort((points[:, 1], points[:, 0]))
    cost, damage = points[order].T
    least = cost if dominated else -np.minimum.accumulate(damage)
    order = order[np.r_[True, least[1:] > least[:-1]]]
    edges = np.concatenate([np.diff(a.hull, axis=0), np.diff(b.hull, axis=0)])
    edges = edges[np.argsort(edges[:, 1] / edges[:, 0], kind="stable")]
    hull = np.cumsum(np.concatenate([a.hull[:1] + b.hull[:1], edges]), axis=0)
    order = order[_thin(points[order], hull, limit)]
    i, j = np.divmod(order, len(b.points))
    return _Front(points[order], hull, np.hstack([a.picks[i], b.picks[j]]))


def _thin(points: NDArray[np.int64], hull: NDArray[np.int64], limit: int) -> NDArray[np.intp]:
    """Which points to keep: the hull's, and the nearest to it in each range of cost."""
    cost, damage = points.T
    if len(points) <= limit:
        return np.arange(len(points))
    gap = damage - np.interp(cost, hull[:, 0], hull[:, 1])
    place = (cost - cost[0]) * limit // (cost[-1] - cost[0] + 1)
    order = np.lexsort((gap, place))
    nearest = order[np.unique(place[order], return_index=True)[1]]
    vertices = np.searchsorted(cost, hull[:, 0], side="right") - 1
    return np.union1d(nearest, vertices)


def _within(front: _Front, group: str, least: int, most: int, limit: int) -> _Front:
    cost = front.points[:, 0]
    inside = np.flatnonzero((cost >= least) & (cost <= most))
    if not len(inside):
        raise InputError(
            f"group {group}: no choice takes between {least} and {most} bytes; "
            f"its choices take from {cost[0]} to {cost[-1]}"
        )
    hull = _hull(front.points[inside])
    inside = inside[_thin(front.points[inside], hull, limit)]
    return _Front(front.points[inside], hull, front.picks[inside])


def _affordable(front: _Front, budget: int, weights: int) -> int:
    """The last point within the budget."""
    best = int(np.searchsorted(front.points[:, 0], budget, side="right")) - 1
    if best < 0:
        least = int(front.points[0, 0])
        raise InputError(
            f"a budget of {_amount(budget, weights, math.floor)} is too small: these options need "
            f"at least {_amount(least, weights, math.ceil)}. Raise it, or allow narrower formats"
        )
    return best


def _pick(
    tables: Mapping[str, Sequence[Option]], front: _Front, names: Sequence[str], at: int
) -> dict[str, Option]:
    picks = dict(zip(names, front.picks[at].tolist(), strict=True))
    return {item: _finite(options)[picks[item]] for item, options in tables.items()}


def _amount(count: int, weights: int, toward: Callable[[Fraction], int]) -> str:
    if not weights:
        return f"{count} bytes"
    bits = toward(Fraction(8000 * count, weights)) / 1000
    return f"{count} bytes ({bits:.3f} bits per weight)"


# --- in one go -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What became of one item."""

    item: str
    group: str
    option: str
    bytes: int
    bits: float
    damage: float


@dataclass(frozen=True)
class Allocation:
    """A choice for every item.

    Attributes:
        rows: one per item.
        budget: bytes that were allowed.
        bytes: that are used.
        damage: predicted: the sum over items, as if errors added up.
        lowest: the smallest choice there is, within the bounds of groups if there are any.
        highest: the cheapest choice of least damage, within the same.
    """

    rows: tuple[Row, ...]
    budget: int
    bytes: int
    damage: float
    lowest: Option
    highest: Option

    HEAD = ("item", "group", "option", "bytes", "bits", "damage")

    @property
    def choice(self) -> dict[str, str]:
        """Item to the name of its option."""
        return {row.item: row.option for row in self.rows}

    def table(self) -> list[tuple[str, ...]]:
        """The rows as text, under ``HEAD``."""
        return [
            (r.item, r.group, r.option, str(r.bytes), f"{r.bits:.2f}", f"{r.damage:.1e}")
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
    decoupled: bool = True,
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
        decoupled: see :func:`damages`.
        bounds: least and most bytes of some groups.

    Raises:
        InputError: see :func:`knapsack`.
    """
    hurts = damages(measured, groups, decoupled=decoupled)
    tables = {
        item: [Option(o, costs[item][o], damage) for o, damage in options.items()]
        for item, options in hurts.items()
    }
    front, names = _front(tables, bounds or {}, groups, LIMIT)
    best = _affordable(front, budget, sum(weights[item] for item in tables))
    lowest, chosen, highest = (_pick(tables, front, names, at) for at in (0, best, -1))
    rows = tuple(
        Row(i, groups[i], o.name, o.cost, 8 * o.cost / weights[i], o.damage)
        for i, o in chosen.items()
    )
    whole = _sum("chosen", chosen)
    return Allocation(
        rows, budget, whole.cost, whole.damage, _sum("lowest", lowest), _sum("highest", highest)
    )


def _sum(name: str, chosen: Mapping[str, Option]) -> Option:
    options = chosen.values()
    return Option(name, sum(o.cost for o in options), sum(o.damage for o in options))


UNITS = {
    f"{prefix}{i}b": base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for i, base in (("", 1000), ("i", 1024))
}


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
