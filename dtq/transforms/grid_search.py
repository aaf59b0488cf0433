# SPDX-License-Identifier: Apache-2.0
"""Search the transform with the lowest output error on a grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from dtq.calibrate.observers import InputStats
from dtq.formats import Format
from dtq.formats.activations import ActivationFormat
from dtq.linalg.hadamard import block_for
from dtq.transforms.choice import TransformChoice, online_transform
from dtq.transforms.objective import OutputErrorObjective
from dtq.transforms.smoothing import column_amax, log_ranges, smoothing_vector

GridPoint = tuple[float, float | None, str]
"""alpha, beta (None: 1 - alpha) and reduction of a smoothing vector."""

_REDUCTIONS = ("max", "mean")


def search(
    weights: Sequence[Tensor],
    stats: InputStats,
    *,
    fmt: Format,
    activations: ActivationFormat,
    step: float = 0.05,
    num_rows: int = 512,
    num_channels: int = 1024,
    max_error_ratio: float = 1.5,
    rotate: bool = True,
    block: int = 64,
    seed: int = 0,
    divisor: bool = False,
) -> TransformChoice:
    """Try no transform, smoothing, rotation and both; choose the lowest output error.

    Smoothing is tried for alpha in [0, 1], with beta = 1 - alpha and beta = 0, and with the amax
    reduced over timesteps by max and by mean (DiTAS' layer-wise grid, 2409.07756, sec. 3.3; here
    on stored rows instead of one sampling run per layer). The grid has a spacing of twice ``step``
    first, then of ``step`` around the best point.

    Args:
        weights: float matrices (N_i, K) that read the input.
        stats: statistics of the input: channels and a sample of rows.
        fmt: weight format.
        activations: format of the transformed input.
        step: spacing of alpha.
        num_rows: input rows that candidates are evaluated on. More are slower, hardly better.
        num_channels: output channels per weight that candidates are evaluated on, evenly spaced.
        max_error_ratio: kinds with an error up to this multiple of the lowest are returned as
            runner-ups. Candidates are evaluated with plain rounding, and a solver that compensates
            errors can reverse a close ranking.
        rotate: try rotations, too. Without them this is SVDQuant's grid (2411.05007, sec. 4.3).
        block: largest Hadamard block.
        seed: of the random signs.
        divisor: as for ``smooth``.

    Returns:
        The choice with the lowest error; ``errors`` has the kinds ``none``, ``smooth``,
        ``hadamard`` and ``smooth + hadamard``.
    """
    objective = OutputErrorObjective(
        [_spread(w, num_channels) for w in weights], stats, fmt, activations, num_rows
    )
    candidates = _Candidates(weights, stats, objective, seed, divisor)
    candidates.add("none", None, 1, "none")
    blocks = {"smooth": 1}
    n = block_for(weights[0].shape[1], block) if rotate else 1
    if n > 1:
        candidates.add("hadamard", None, n, f"hadamard {n}")
        blocks["smooth + hadamard"] = n
    for kind, size in blocks.items():
        coarse = {point: candidates.smooth(kind, size, point) for point in _grid(2 * step)}
        alpha, beta, reduce = min(coarse, key=lambda point: coarse[point])
        for neighbor in (alpha - step, alpha + step):
            if 0 <= neighbor <= 1:
                candidates.smooth(kind, size, (neighbor, beta, reduce))
    return candidates.choice(max_error_ratio)


class _Candidates:
    """Evaluates candidates, and keeps the best of each kind."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        stats: InputStats,
        objective: OutputErrorObjective,
        seed: int,
        divisor: bool,
    ) -> None:
        self.weights, self.objective, self.seed, self.divisor = weights, objective, seed, divisor
        amax = [column_amax(weights).unsqueeze(0)]  # all that smoothing reads of the weights
        self.ranges = {reduce: log_ranges(amax, stats, reduce) for reduce in _REDUCTIONS}
        self.best: dict[str, tuple[float, TransformChoice]] = {}
        self.cache: dict[tuple[int, bytes], float] = {}  # the corners of the grid coincide

    def add(self, kind: str, s: Tensor | None, block: int, label: str) -> float:
        """The output error of a transform."""
        transform = online_transform(self.weights[0], s, block, self.seed, divisor=self.divisor)
        key = block, transform.scale.view(torch.uint8).cpu().numpy().tobytes()
        if key not in self.cache:
            self.cache[key] = self.objective(transform)
        error = self.cache[key]
        if kind not in self.best or error < self.best[kind][0]:
            self.best[kind] = error, TransformChoice(transform, label)
        return error

    def smooth(self, kind: str, block: int, point: GridPoint) -> float:
        """The output error with smoothing."""
        alpha, beta, reduce = point
        s = smoothing_vector(*self.ranges[reduce], alpha, beta)
        rotation = f" + hadamard {block}" if block > 1 else ""
        power = "" if beta is None else f", beta {beta:g}"
        return self.add(kind, s, block, f"smooth({alpha:.2f}{power}, {reduce}){rotation}")

    def choice(self, max_error_ratio: float) -> TransformChoice:
        """The best of all; kinds with nearly its error are runner-ups."""
        errors = {kind: error for kind, (error, _) in self.best.items()}
        ranked = sorted(self.best.values(), key=lambda pair: pair[0])
        limit = max_error_ratio * ranked[0][0]
        first, *others = (replace(c, errors=errors) for error, c in ranked if error <= limit)
        return replace(first, runner_ups=tuple(others))


def _grid(step: float) -> Iterator[GridPoint]:
    count = round(1.0 / step) + 1
    for i, beta, reduce in product(range(count), (None, 0.0), _REDUCTIONS):
        yield i * step, beta, reduce


def _spread(w: Tensor, count: int) -> Tensor:
    """At most ``count`` rows of (N, K), evenly spaced."""
    if len(w) <= count:
        return w
    return w[torch.arange(count, device=w.device) * len(w) // count]
