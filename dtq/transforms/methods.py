# SPDX-License-Identifier: Apache-2.0
"""The transform methods: ``(weights, stats, *, fmt, acts, **knobs) -> Choice``.

``weights`` are the matrices that share one input, ``stats`` what calibration remembers of it.
Every method but ``search`` does as it is told; ``search`` tries them all and keeps the best.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtq.calibrate.observers import InputStats
from dtq.formats import Format
from dtq.formats.activations import ActivationFormat
from dtq.linalg.hadamard import block_for
from dtq.transforms.base import OnlineTransform
from dtq.transforms.choice import TransformChoice, _online, _signs
from dtq.transforms.objective import OutputErrorObjective
from dtq.transforms.smoothing import smoothing


def none(
    weights: Sequence[Tensor],
    stats: InputStats | None,
    *,
    fmt: Format,
    activations: ActivationFormat,
) -> TransformChoice:
    """No transform."""
    return TransformChoice(_online(weights, None, 1, 0), "none", {})


def smooth(
    weights: Sequence[Tensor],
    stats: InputStats,
    *,
    fmt: Format,
    activations: ActivationFormat,
    alpha: float = 0.5,
    reduce: str = "max",
) -> TransformChoice:
    """SmoothQuant's vector with a given alpha, peaks aggregated over timesteps."""
    s = smoothing(weights, stats, alpha=alpha, reduce=reduce)
    return TransformChoice(_online(weights, s, 1, 0), f"smooth({alpha:g}, {reduce})", {})


def hadamard(
    weights: Sequence[Tensor],
    stats: InputStats | None,
    *,
    fmt: Format,
    activations: ActivationFormat,
    block: int = 64,
    seed: int = 0,
) -> TransformChoice:
    """Random signs, then a Hadamard rotation over blocks of channels (QuaRot, 2404.00456)."""
    n = block_for(weights[0].shape[1], block)
    return TransformChoice(_online(weights, None, n, seed), f"hadamard {n}", {})


def smooth_hadamard(
    weights: Sequence[Tensor],
    stats: InputStats,
    *,
    fmt: Format,
    activations: ActivationFormat,
    alpha: float = 0.5,
    reduce: str = "max",
    block: int = 64,
    seed: int = 0,
) -> TransformChoice:
    """Static channel balancing, then rotation (ViDiT-Q, 2406.02540, sec. 3.3)."""
    n = block_for(weights[0].shape[1], block)
    s = smoothing(weights, stats, alpha=alpha, reduce=reduce)
    return TransformChoice(
        _online(weights, s, n, seed), f"smooth({alpha:g}, {reduce}) + hadamard {n}", {}
    )


def ditas(
    weights: Sequence[Tensor],
    stats: InputStats,
    *,
    fmt: Format,
    activations: ActivationFormat,
    step: float = 0.05,
    reduce: str = "max",
    num_rows: int = 1024,
) -> TransformChoice:
    """DiTAS' temporal-aggregated smoothing with its layer-wise grid (2409.07756, sec. 3.2, 3.3).

    Alpha over [0, 1] by ``step``, judged by the squared output error of the layer with weights and
    activations quantized. The identity is a candidate too; smoothing comes before the weight is
    quantized, where the released code smooths the quantized weight.
    """
    judge = OutputErrorObjective(weights, stats, fmt, activations, num_rows)
    best = _online(weights, None, 1, 0)
    label, errors = "none", {"none": judge(best)}
    least = errors["none"]
    for i in range(round(1 / step) + 1):
        s = smoothing(weights, stats, alpha=i * step, reduce=reduce)
        transform = _online(weights, s, 1, 0)
        error = judge(transform)
        errors["smooth"] = min(error, errors.get("smooth", error))
        if error < least:
            least, best, label = error, transform, f"smooth({i * step:.2f}, {reduce})"
    return TransformChoice(best, label, errors)


def ars(
    weights: Sequence[Tensor],
    stats: InputStats,
    *,
    fmt: Format,
    activations: ActivationFormat,
    alpha: float = 0.5,
    reduce: str = "max",
    limit: float = 4.0,
    block: int = 64,
    seed: int = 0,
) -> TransformChoice:
    """LRQ-DiT's adaptive rotation scheme (2508.03485): Hadamard, or a dual rotation where needed.

    The paper rotates twice, with an outlier-aware permutation, where ``|X|_F / sqrt(numel)`` is
    large; multiplying an activation by a constant would change that choice. Here the statistic is
    the incoherence of the rows after one Hadamard, the mean over rows of ``max|x| / rms(x)``: what
    one turn left over ``limit`` gets the second. The permutation deals channels by peak over the
    blocks in zigzag order (DuQuant, 2406.01721, sec. 3.2), so that no block holds two outliers;
    the greedy rotation of DuQuant is replaced by the Hadamard, which spreads a lone outlier evenly.

    Args:
        alpha: of the smoothing that comes first (0.5 in every released script).
        over: aggregation of the peaks over timesteps.
        limit: incoherence above which the dual rotation is used; Gaussian rows have about 3.
        block: largest Hadamard block.
        seed: of the random signs.
    """
    n = block_for(weights[0].shape[1], block)
    s = smoothing(weights, stats, alpha=alpha, reduce=reduce)
    once = _online(weights, s, n, seed)
    if n == 1:
        return TransformChoice(once, f"smooth({alpha:g}, {reduce})", {})
    assert stats.sample is not None
    rows = stats.sample.rows.to(weights[0].device)
    label = f"smooth({alpha:g}, {reduce}) + "
    if incoherence(once.x(rows)) <= limit:
        return TransformChoice(once, f"{label}hadamard {n}", {})
    twice = OnlineTransform.of(
        s, _signs(weights[0], seed), n, zigzag((rows / s).abs().amax(0), n), num_rotations=2
    )
    return TransformChoice(twice, f"{label}dual hadamard {n}", {})


def incoherence(rows: Tensor) -> float:
    """Mean over rows (R, K) of the largest magnitude over the root mean square; scale-invariant."""
    rms = rows.square().mean(-1).sqrt().clamp(min=1e-30)
    return float((rows.abs().amax(-1) / rms).mean())


def zigzag(peaks: Tensor, block: int) -> Tensor:
    """An order of channels that deals them, largest peak first, over K/block blocks back and forth.

    Returns:
        int64 (K,), the channel that moves to each place.
    """
    blocks = len(peaks) // block
    dealt = torch.argsort(peaks, descending=True, stable=True).reshape(block, blocks)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.reshape(-1)
