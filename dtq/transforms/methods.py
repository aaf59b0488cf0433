# SPDX-License-Identifier: Apache-2.0
"""The transform methods: ``(weights, stats, *, fmt, acts, **knobs) -> Choice``.

``weights`` are the matrices that share one input, ``stats`` what calibration remembers of it.
Every method but ``search`` does as it is told; ``search`` tries them all and keeps the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtq.calibrate.stats import SiteStats
from dtq.formats import FORMATS, Format, bits_per_weight, snapped
from dtq.formats.acts import Acts, fake_quantize
from dtq.transforms.base import Online
from dtq.transforms.hadamard import block_for, signs
from dtq.transforms.smooth import column_peaks, smoothing


@dataclass(frozen=True)
class Choice:
    """A transform and how it was found.

    Attributes:
        transform: what the layers of the site will run.
        label: the choice in words, such as ``smooth(0.35, max) + hadamard 64``.
        errors: relative output error by candidate family, empty when nothing was searched.
        rivals: other choices that came close; the caller may solve them too and keep the best.
    """

    transform: Online
    label: str
    errors: dict[str, float]
    rivals: tuple[Choice, ...] = ()


def none(weights: Sequence[Tensor], stats: SiteStats | None, *, fmt: Format, acts: Acts) -> Choice:
    """No transform."""
    return Choice(_online(weights, None, 1, 0), "none", {})


def smooth(
    weights: Sequence[Tensor],
    stats: SiteStats,
    *,
    fmt: Format,
    acts: Acts,
    alpha: float = 0.5,
    over: str = "max",
) -> Choice:
    """SmoothQuant's vector with a given alpha, peaks aggregated over timesteps."""
    s = smoothing(weights, stats, alpha=alpha, over=over)
    return Choice(_online(weights, s, 1, 0), f"smooth({alpha:g}, {over})", {})


def hadamard(
    weights: Sequence[Tensor],
    stats: SiteStats | None,
    *,
    fmt: Format,
    acts: Acts,
    block: int = 64,
    seed: int = 0,
) -> Choice:
    """Random signs, then a Hadamard rotation over blocks of channels (QuaRot, 2404.00456)."""
    n = block_for(weights[0].shape[1], block)
    return Choice(_online(weights, None, n, seed), f"hadamard {n}", {})


def smooth_hadamard(
    weights: Sequence[Tensor],
    stats: SiteStats,
    *,
    fmt: Format,
    acts: Acts,
    alpha: float = 0.5,
    over: str = "max",
    block: int = 64,
    seed: int = 0,
) -> Choice:
    """Static channel balancing, then rotation (ViDiT-Q, 2406.02540, sec. 3.3)."""
    n = block_for(weights[0].shape[1], block)
    s = smoothing(weights, stats, alpha=alpha, over=over)
    return Choice(_online(weights, s, n, seed), f"smooth({alpha:g}, {over}) + hadamard {n}", {})


def ditas(
    weights: Sequence[Tensor],
    stats: SiteStats,
    *,
    fmt: Format,
    acts: Acts,
    step: float = 0.05,
    over: str = "max",
    rows: int = 1024,
) -> Choice:
    """DiTAS' temporal-aggregated smoothing with its layer-wise grid (2409.07756, sec. 3.2, 3.3).

    Alpha over [0, 1] by ``step``, judged by the squared output error of the layer with weights and
    activations quantized. The identity is a candidate too; smoothing comes before the weight is
    quantized, where the released code smooths the quantized weight.
    """
    judge = _Judge(weights, stats, fmt, acts, rows)
    best = _online(weights, None, 1, 0)
    label, errors = "none", {"none": judge(best)}
    least = errors["none"]
    for i in range(round(1 / step) + 1):
        s = smoothing(weights, stats, alpha=i * step, over=over)
        transform = _online(weights, s, 1, 0)
        error = judge(transform)
        errors["smooth"] = min(error, errors.get("smooth", error))
        if error < least:
            least, best, label = error, transform, f"smooth({i * step:.2f}, {over})"
    return Choice(best, label, errors)


def ars(
    weights: Sequence[Tensor],
    stats: SiteStats,
    *,
    fmt: Format,
    acts: Acts,
    alpha: float = 0.5,
    over: str = "max",
    limit: float = 4.0,
    block: int = 64,
    seed: int = 0,
) -> Choice:
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
    s = smoothing(weights, stats, alpha=alpha, over=over)
    once = _online(weights, s, n, seed)
    if n == 1:
        return Choice(once, f"smooth({alpha:g}, {over})", {})
    assert stats.reservoir is not None
    rows = stats.reservoir.rows.to(weights[0].device)
    label = f"smooth({alpha:g}, {over}) + "
    if incoherence(once.x(rows)) <= limit:
        return Choice(once, f"{label}hadamard {n}", {})
    twice = Online.of(s, _signs(weights[0], seed), n, zigzag((rows / s).abs().amax(0), n), turns=2)
    return Choice(twice, f"{label}dual hadamard {n}", {})


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


def search(
    weights: Sequence[Tensor],
    stats: SiteStats,
    *,
    fmt: Format,
    acts: Acts,
    step: float = 0.05,
    rows: int = 512,
    outputs: int = 1024,
    close: float = 1.5,
    rotate: bool = True,
    block: int = 64,
    seed: int = 0,
) -> Choice:
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
    judge = _Judge([_spread(w, outputs) for w in weights], stats, fmt, acts, rows)
    n = block_for(weights[0].shape[1], block) if rotate else 1
    peaks = [column_peaks(weights).unsqueeze(0)]  # all that smoothing wants of the weights
    best: dict[str, tuple[float, Online, str]] = {}
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
            s = smoothing(peaks, stats, alpha=alpha, beta=0.0 if awq else None, over=over)
            label = f"smooth({alpha:.2f}{', weights aside' if awq else ''}, {over}){tail}"
            coarse[alpha, awq, over] = try_(kind, s, size, label)
        alpha, awq, over = min(coarse, key=lambda key: coarse[key])
        for near in (alpha - step, alpha + step):
            if 0 <= near <= 1:
                s = smoothing(peaks, stats, alpha=near, beta=0.0 if awq else None, over=over)
                label = f"smooth({near:.2f}{', weights aside' if awq else ''}, {over}){tail}"
                try_(kind, s, size, label)
    ranked = sorted(best.values(), key=lambda found: found[0])
    errors = {kind: error for kind, (error, _, _) in best.items()}
    kept = [found for found in ranked if found[0] <= close * ranked[0][0]]
    first, *rivals = (Choice(transform, label, errors) for _, transform, label in kept)
    return replace(first, rivals=tuple(rivals))


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


class _Judge:
    """Relative squared output error of a site under a transform, on sampled rows."""

    def __init__(
        self, weights: Sequence[Tensor], stats: SiteStats, fmt: Format, acts: Acts, rows: int
    ) -> None:
        assert stats.reservoir is not None
        self.weights = [w.float() for w in weights]
        sample = stats.reservoir.rows.to(self.weights[0])
        self.x = sample[:: max(1, len(sample) // rows)][:rows]
        self.want = [self.x @ w.T for w in self.weights]
        self.power = [want.square().sum().clamp(min=1e-30) for want in self.want]
        self.fmt, self.acts = _stand_in(fmt, self.weights[0]), acts

    def __call__(self, transform: Online) -> float:
        x = fake_quantize(transform.x(self.x), self.acts)
        error = 0.0
        for w, want, power in zip(self.weights, self.want, self.power, strict=True):
            changed = transform.w(w)
            got = x @ snapped(self.fmt, changed, self.fmt.fit(changed)).T
            error += float(got.sub_(want).square_().sum() / power) / len(self.weights)
        return error


def _stand_in(fmt: Format, like: Tensor) -> Format:
    """A format that learns its levels would learn them again for every candidate: judge with
    integers of as many bits in its place."""
    if not fmt.learned:
        return fmt
    bits = bits_per_weight(fmt, (4096, 4096))
    name = "int2-g64" if bits < 2.5 else "int3-g64" if bits < 3.5 else "int4-g64"
    return FORMATS[name if like.shape[1] % 64 == 0 else "int4-row"]


def _online(weights: Sequence[Tensor], s: Tensor | None, block: int, seed: int) -> Online:
    w = weights[0]
    s = torch.ones(w.shape[1], device=w.device) if s is None else s
    sign = _signs(w, seed) if block > 1 else torch.ones(w.shape[1], device=w.device)
    return Online.of(s, sign, block)


def _signs(w: Tensor, seed: int) -> Tensor:
    return signs(w.shape[1], seed).to(w.device)
