# SPDX-License-Identifier: Apache-2.0
"""Search the transform with the lowest output error on a grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dtq.calibrate.observers import InputStats
from dtq.formats import Format
from dtq.formats.activations import ActivationFormat
from dtq.linalg.hadamard import block_for
from dtq.transforms.base import OnlineTransform
from dtq.transforms.choice import TransformChoice, _online
from dtq.transforms.objective import OutputErrorObjective
from dtq.transforms.smoothing import column_amax, smoothing


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
) -> TransformChoice:
    """Try none, smoothing, rotation and both on sampled rows; keep the smallest output error.

    Smoothing runs over alpha in [0, 1], with beta = 1 - alpha and beta = 0, peaks aggregated by
    max and by mean (DiTAS' layer-wise grid, 2409.07756, sec. 3.3, on stored rows instead of one
    sampling run a layer). The grid is walked at twice ``step`` first, then around the best.

    Args:
        step: spacing of alpha.
        rows: sampled input rows that candidates are judged on.
        outputs: channels of each output, evenly spread, that candidates are judged on.
        close: families within this factor of the best are returned as rivals. Candidates are judged
            with plain rounding; a solver that repairs errors can turn a close order around.
        rotate: try rotations too; without them this is SVDQuant's grid (2411.05007, sec. 4.3).
        block: largest Hadamard block.
        seed: of the random signs.
    """
    judge = OutputErrorObjective(
        [_spread(w, num_channels) for w in weights], stats, fmt, activations, num_rows
    )
    n = block_for(weights[0].shape[1], block) if rotate else 1
    peaks = [column_amax(weights).unsqueeze(0)]  # all that smoothing wants of the weights
    best: dict[str, tuple[float, OnlineTransform, str]] = {}
    judged: dict[tuple[int, bytes], float] = {}

    def try_(kind: str, s: Tensor | None, size: int, label: str) -> float:
        transform = _online(weights, s, size, seed)
        key = size, transform.scale.view(torch.uint8).cpu().numpy().tobytes()
        if key not in judged:  # the corners of the grid meet
            judged[key] = judge(transform)
        error = judged[key]
        if kind not in best or error < best[kind][0]:
            best[kind] = (error, transform, label)
        return error

    try_("none", None, 1, "none")
    sizes = {"smooth": 1}
    if n > 1:
        try_("hadamard", None, n, f"hadamard {n}")
        sizes["smooth + hadamard"] = n
    for kind, size in sizes.items():
        tail = f" + hadamard {size}" if size > 1 else ""
        coarse: dict[tuple[float, bool, str], float] = {}
        for alpha, awq, over in _grid(0.0, 1.0, 2 * step):
            s = smoothing(peaks, stats, alpha=alpha, beta=0.0 if awq else None, reduce=over)
            label = f"smooth({alpha:.2f}{', weights aside' if awq else ''}, {over}){tail}"
            coarse[alpha, awq, over] = try_(kind, s, size, label)
        alpha, awq, over = min(coarse, key=lambda key: coarse[key])
        for near in (alpha - step, alpha + step):
            if 0 <= near <= 1:
                s = smoothing(peaks, stats, alpha=near, beta=0.0 if awq else None, reduce=over)
                label = f"smooth({near:.2f}{', weights aside' if awq else ''}, {over}){tail}"
                try_(kind, s, size, label)
    ranked = sorted(best.values(), key=lambda found: found[0])
    errors = {kind: error for kind, (error, _, _) in best.items()}
    kept = [found for found in ranked if found[0] <= max_error_ratio * ranked[0][0]]
    first, *rivals = (TransformChoice(transform, label, errors) for _, transform, label in kept)
    return replace(first, runner_ups=tuple(rivals))


def _grid(low: float, high: float, step: float) -> Iterator[tuple[float, bool, str]]:
    for i in range(round((high - low) / step) + 1):
        for awq in (False, True):
            for over in ("max", "mean"):
                yield low + i * step, awq, over


def _spread(w: Tensor, count: int) -> Tensor:
    """At most ``count`` rows of (N, K), evenly spread."""
    if len(w) <= count:
        return w
    return w[torch.arange(count, device=w.device) * len(w) // count]
