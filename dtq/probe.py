# SPDX-License-Identifier: Apache-2.0
"""How long the layers of a plan will take on this machine: the real work, on small random layers.

What a layer costs depends on its format, solver and transform, on the processor and on the number
of threads. Two small layers are solved for each kind of layer in a plan; products of matrices,
which grow otherwise than the rest, are counted apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dtq.calibrate.stats import Origin, Reservoir, SiteStats
from dtq.plan import LayerPlan
from dtq.recipe import Recipe
from dtq.solve import choose, solve_site
from dtq.transforms import TRANSFORMS

_COLUMNS, _ROWS = 512, (256, 768)
_BINS = 4


@dataclass(frozen=True)
class Pace:
    """Seconds of one kind of layer.

    Attributes:
        judged: of the transform search, per element of the sampled rows and of the judged weights.
        outputs: judged channels of an output at most, 0 where nothing is searched.
        rows: sampled inputs that are judged on.
        column, weight: of solving once, products aside.
        tries: transforms that are solved.
    """

    judged: float
    outputs: int
    rows: int
    column: float
    weight: float
    tries: int

    def seconds(self, shape: tuple[int, int], rate: float, gram: bool) -> float:
        """For a linear (N, K).

        Args:
            shape: (N, K).
            rate: float32 operations a second.
            gram: whether there are second moments, so GPTQ's products.
        """
        n, k = shape
        search = self.judged * k * (self.rows + min(n, self.outputs)) if self.outputs else 0.0
        solve = self.column * k + self.weight * n * k + _products(n, k, rate, gram)
        return search + self.tries * solve


def paces(
    layers: Iterable[LayerPlan], recipe: Recipe, needs: frozenset[str], rate: float
) -> dict[LayerPlan, Pace]:
    """Measure each kind of layer once.

    Args:
        layers: of a plan, quantized ones.
        recipe: that they are solved by.
        needs: statistics that there will be.
        rate: float32 operations a second.

    Returns:
        By :func:`kind`.
    """
    found: dict[LayerPlan, Pace] = {}
    for layer in layers:
        if kind(layer) not in found:
            found[kind(layer)] = _measured(kind(layer), recipe, needs, rate)
    return found


def kind(layer: LayerPlan) -> LayerPlan:
    """What a layer has in common with all that take the same time a weight."""
    return replace(layer, name="probe", role="", shape=(_ROWS[1], _COLUMNS), note="")


def _measured(layer: LayerPlan, recipe: Recipe, needs: frozenset[str], rate: float) -> Pace:
    generator = torch.Generator().manual_seed(0)
    stats = _statistics(needs, generator) if needs else None
    if stats is None:
        layer = replace(layer, transform=type(layer.transform)("none"))
    spans, searched, tries = [], 0.0, 1
    for n in _ROWS:
        members = [replace(layer, shape=(n, _COLUMNS))]
        weights = [torch.randn(n, _COLUMNS, generator=generator) * 0.02]
        choice = choose(members, weights, stats)
        alone = replace(choice, rivals=())
        if n == _ROWS[1] and TRANSFORMS[layer.transform.name].call is TRANSFORMS["search"].call:
            searched = _span(partial(choose, members, weights, stats))
            tries = 1 + len(choice.rivals)
        solved = _span(partial(solve_site, members, weights, alone, stats, recipe))
        spans.append(max(0.0, solved - _products(n, _COLUMNS, rate, "gram" in needs)))
    few, many = spans
    weight = max(0.0, (many - few) / ((_ROWS[1] - _ROWS[0]) * _COLUMNS))
    column = max(0.0, few / _COLUMNS - weight * _ROWS[0])
    knobs = {"rows": 512, "outputs": 1024} | dict(layer.transform.knobs)
    rows, outputs = int(knobs["rows"]), int(knobs["outputs"]) if searched else 0
    judged = searched / (_COLUMNS * (rows + min(_ROWS[1], outputs)))
    return Pace(judged, outputs, rows, column, weight, tries)


def _span(work: Callable[[], object]) -> float:
    """Seconds of the faster of two runs; with one thread of its own time, not of others'."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = math.inf
    for _ in range(2):
        started = clock()
        work()
        best = min(best, clock() - started)
    return best


def _products(n: int, k: int, rate: float, gram: bool) -> float:
    """Seconds of what grows faster than the weight: errors on sampled rows; factors and repairs."""
    rows = Reservoir(k, 1).per_stratum * 2
    flops = 4.0 * rows * n * k
    if gram:
        flops += 2.0 * n * k * k + 2 * 2.0 * k**3  # float64 takes twice the time
    return flops / rate


def _statistics(needs: frozenset[str], generator: torch.Generator) -> SiteStats:
    """Of made-up inputs with a few large channels."""
    stats = SiteStats(_COLUMNS, _BINS, needs)
    spread: Tensor = torch.exp(0.5 * torch.randn(_COLUMNS, generator=generator))
    spread[::100] *= 20
    for call in range(2 * _BINS):
        rows = torch.randn(1024, _COLUMNS, generator=generator) * spread
        stats.see(rows, Origin(call % _BINS, call, torch.arange(len(rows)) % 2))
    return stats
