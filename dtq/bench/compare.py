# SPDX-License-Identifier: Apache-2.0
"""Time candidates against each other, and summarize the ratios of their times.

A comparison is interleaved: in every round each candidate runs once (a short one several times), in
random order. Ratios are of two times of the same round, and their median over the rounds counts. So
a machine that is busy with something else slows both.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dtq.bench.layers import RECIPES
from dtq.bench.timer import Clock, HostClock
from dtq.errors import InputError
from dtq.linalg.relative_error import relative_error

PEER = "openvino"
"""First word of the candidates that a step of dtq is compared with in the verdict."""


def first_output(result: Any) -> Tensor:
    """What a linear returns, or the first element of what a model returns."""
    output: Tensor = result if isinstance(result, Tensor) else result[0]
    return output


@dataclass
class Candidate:
    """One implementation of the work.

    Attributes:
        name: of the row.
        run: does the work once.
        bytes: of its weights, with scales and everything else; None: unknown.
        about: the package with its version, and the mode.
        output: from what ``run`` returns to what the float model returns; not timed.
    """

    name: str
    run: Callable[[], object]
    bytes: int | None
    about: str = ""
    output: Callable[[Any], Tensor] = first_output


@dataclass
class BenchRow:
    """Times of one candidate at one size.

    Attributes:
        case: ``K x N``, or the name of a model.
        tokens: M, or the tokens of a sample.
        name: of the candidate.
        seconds: median time of a run.
        bytes: of its weights; None: unknown.
        ratio: by reference candidate, quartiles of this one's time over the reference's; above 1
            the reference is faster.
        error: relative squared error of its output, compared with the float model on the same
            input; None: the comparison has no reference.
        about: the package with its version, and the mode.
        share: int8 operations per second as a fraction of the peak of the CPU, see ``cpu.peak``.
    """

    case: str
    tokens: int
    name: str
    seconds: float
    bytes: int | None
    ratio: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    error: float | None = None
    about: str = ""
    share: float | None = None


Progress = Callable[[list[BenchRow]], None]
"""Is called with the rows of each comparison when it ends."""


@dataclass
class Result:
    """A whole suite.

    Attributes:
        suite: its name.
        conditions: of the measurement, by name.
        rows: of all comparisons.
    """

    suite: str
    conditions: dict[str, str | int]
    rows: list[BenchRow]

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the verdicts."""
        found = {"verdict": verdict(self.rows), "peers": peer_verdicts(self.rows)}
        return asdict(self) | found


def linear_name(k: int, n: int) -> str:
    """Name of the comparison of linears of ``k`` inputs and ``n`` outputs."""
    return f"{k} x {n}"


def run_all(
    comparisons: Iterable[list[BenchRow]], progress: Progress | None, case: str = ""
) -> list[BenchRow]:
    """All rows of some comparisons; an iterator runs a comparison when it is asked for.

    Raises:
        InputError: there is none, since no name contains ``case``.
    """
    rows: list[BenchRow] = []
    for compared in comparisons:
        rows += compared
        if progress:
            progress(compared)
    if not rows:
        raise InputError(f"the suite has no case whose name contains {case!r} (--case)")
    return rows


def timing(clock: Clock, rounds: int) -> dict[str, str | int]:
    """Conditions of every measurement: how and when it was made."""
    date = time.strftime("%Y-%m-%d")
    return {"clock": clock.name, "torch": torch.__version__, "rounds": rounds, "date": date}


@torch.no_grad()
def compare(
    case: str,
    tokens: int,
    candidates: Sequence[Candidate],
    rounds: int,
    clock: Clock | None = None,
    relative_to: Iterable[str] = tuple(RECIPES),
    reference: Tensor | None = None,
) -> list[BenchRow]:
    """Time candidates in interleaved rounds.

    Args:
        case: ``K x N``, or the name of a model.
        tokens: M, or the tokens of a sample.
        candidates: what is timed.
        rounds: at least 2.
        clock: None: the host's.
        relative_to: names of the reference candidates; those that are missing are skipped.
        reference: output of the float model; None: errors are not measured.

    Returns:
        A row per candidate, with ratios to each reference candidate.
    """
    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    errors = {c.name: _error(c, reference) for c in candidates}
    watches = {c.name: (clock or HostClock()).watch(c.run) for c in candidates}
    for i in range(rounds):
        shuffled = list(candidates)
        random.Random(i).shuffle(shuffled)
        for c in shuffled:
            times[c.name].append(watches[c.name]())
    rows = []
    for c in candidates:
        ratio = {
            name: _quartiles(a / b for a, b in zip(times[c.name], times[name], strict=True))
            for name in relative_to
            if name in times and name != c.name
        }
        seconds = statistics.median(times[c.name])
        error = errors[c.name]
        rows.append(BenchRow(case, tokens, c.name, seconds, c.bytes, ratio, error, c.about))
    return rows


def _error(candidate: Candidate, reference: Tensor | None) -> float | None:
    if reference is None:
        return None
    return relative_error(candidate.output(candidate.run()), reference)


def geometric_means(rows: Iterable[BenchRow], reference: str) -> dict[tuple[int, str], float]:
    """By tokens and candidate: its time over that of ``reference``, mean over all cases."""
    ratios: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        if reference in row.ratio:
            ratios.setdefault((row.tokens, row.name), []).append(row.ratio[reference][1])
    return {key: statistics.geometric_mean(values) for key, values in ratios.items()}


def groups(result: Result, reference: str) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Times over that of ``reference`` and errors, for a chart.

    Returns:
        By case, or for ``gemm`` by tokens; by candidate.
    """
    compared: dict[str, dict[str, list[BenchRow]]] = {}
    for row in result.rows:
        if reference in row.ratio or row.name == reference:
            title = f"M {row.tokens}" if result.suite == "gemm" else row.case
            compared.setdefault(title, {}).setdefault(row.name, []).append(row)
    return {
        title: {name: _mean(rows, reference) for name, rows in named.items()}
        for title, named in compared.items()
    }


def _mean(rows: Sequence[BenchRow], reference: str) -> tuple[float, float | None]:
    """Geometric means of ratio and error; without an error if one is unknown, zero or infinite."""
    ratio = statistics.geometric_mean(
        row.ratio[reference][1] if reference in row.ratio else 1.0 for row in rows
    )
    errors = [row.error for row in rows if row.error is not None and 0 < row.error < math.inf]
    return ratio, statistics.geometric_mean(errors) if len(errors) == len(rows) else None


def fastest(rows: Iterable[BenchRow], names: Iterable[str]) -> BenchRow | None:
    """The row with the least time among those whose names start with one of ``names``."""
    found = [row for row in rows if row.name.startswith(tuple(names))]
    return min(found, key=lambda row: row.seconds, default=None)


def peer_verdicts(rows: Iterable[BenchRow]) -> list[str]:
    """A sentence for each case with rows of OpenVINO: the fastest of each, with their errors."""
    cases: dict[str, list[BenchRow]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    told = []
    for case, compared in cases.items():
        ours, peer = fastest(compared, RECIPES), fastest(compared, (PEER,))
        if ours is None or peer is None or peer.name not in ours.ratio:
            continue
        errors = f"errors {ours.error:.1e} and {peer.error:.1e}"
        ratio = ours.ratio[peer.name][1]
        told.append(f"{case}: {ours.name} takes {ratio:.2f}x the time of {peer.name}, {errors}")
    return told


def verdict(rows: Sequence[BenchRow]) -> str:
    """A sentence, which recommends only what is faster than every float candidate.

    Without rows of recipes it is empty.
    """
    many = [row for row in rows if row.tokens > 1]
    speeds = []
    for recipe in RECIPES:
        speedup: dict[str, float] = {}
        for name in ("bf16", "fp32"):
            found = [r.ratio[recipe][1] for r in many if r.name == name and recipe in r.ratio]
            if found:
                speedup[name] = statistics.geometric_mean(found)
        if speedup:
            fastest = min(speedup, key=lambda name: speedup[name])  # of the float candidates
            smaller = f"{_bytes(many, 'bf16') / _bytes(many, recipe):.1f}x smaller than bf16"
            speeds.append((speedup[fastest], recipe, fastest, smaller))
    if not speeds:
        return ""
    speed, recipe, fastest, smaller = max(speeds)
    if speed > 1:
        return f"{recipe} is {speed:.1f}x faster than {fastest} here and {smaller}"
    return (
        f"nothing of dtq is faster than {fastest} here; {recipe} takes {1 / speed:.1f}x as long "
        f"and is {smaller}: quantize for memory, not for speed"
    )


def _quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _bytes(rows: Iterable[BenchRow], name: str) -> int:
    return sum(row.bytes or 0 for row in rows if row.name == name)
