# SPDX-License-Identifier: Apache-2.0
"""Transform methods: ``(weights, stats, *, fmt, activations, **knobs) -> TransformChoice``.

``weights`` are the matrices that read one input, ``stats`` is what calibration collected of it.
``search`` (``grid_search.py``) compares all kinds of transforms; each method here is that
of one paper.
Knobs that recur: ``alpha``, how much of the activation's range smoothing moves into the weight, 0.5
as in SmoothQuant; ``reduce``, how the channel amax of the timestep bins becomes one, ``max`` as in
DiTAS; ``block``, the largest Hadamard block, 64 because most widths are multiples of it; ``seed``
of the random signs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtq.calibrate.observers import InputStats
from dtq.formats import Format
from dtq.formats.activations import ActivationFormat
from dtq.linalg.hadamard import block_for, regular_block_for, regular_signs
from dtq.transforms.base import OnlineTransform
from dtq.transforms.choice import TransformChoice, online_transform
from dtq.transforms.objective import OutputErrorObjective
from dtq.transforms.smoothing import smoothing


def none(
    weights: Sequence[Tensor],
    stats: InputStats | None,
    *,
    fmt: Format,
    activations: ActivationFormat,
) -> TransformChoice:
    """No transform.

    Args:
        weights: float matrices (N_i, K) that read the input.
        stats: not used.
        fmt: not used.
        activations: not used.

    Returns:
        The identity.
    """
    return TransformChoice(online_transform(weights[0], None), "none")


def smooth(
    weights: Sequence[Tensor],
    stats: InputStats,
    *,
    fmt: Format,
    activations: ActivationFormat,
    alpha: float = 0.5,
    reduce: str = "max",
    divisor: bool = False,
) -> TransformChoice:
    """Smoothing with a given alpha (SmoothQuant, 2211.10438, eq. 4).

    Args:
        weights: float matrices (N_i, K) that read the input.
        stats: statistics of the input: channels.
        fmt: not used.
        activations: not used.
        alpha: how much of the activation's range moves into the weight, 0 to 1.
        reduce: reduction of the channel amax over timestep bins, a key of ``REDUCTIONS``.
        divisor: store what an engine that divides by a bfloat16 vector can give back.

    Returns:
        The smoothing transform.
    """
    s = smoothing(weights, stats, alpha=alpha, reduce=reduce)
    transform = online_transform(weights[0], s, divisor=divisor)
    return TransformChoice(transform, f"smooth({alpha:g}, {reduce})")


def hadamard(
    weights: Sequence[Tensor],
    stats: InputStats | None,
    *,
    fmt: Format,
    activations: ActivationFormat,
    block: int = 64,
    seed: int = 0,
) -> TransformChoice:
    """Random signs, then a Hadamard rotation over blocks of channels (QuaRot, 2404.00456).

    Args:
        weights: float matrices (N_i, K) that read the input.
        stats: not used.
        fmt: not used.
        activations: not used.
        block: largest Hadamard block.
        seed: of the random signs.

    Returns:
        The rotation.
    """
    n = block_for(weights[0].shape[1], block)
    return TransformChoice(online_transform(weights[0], None, n, seed), f"hadamard {n}")


def convrot(
    weights: Sequence[Tensor],
    stats: InputStats | None,
    *,
    fmt: Format,
    activations: ActivationFormat,
    block: int = 256,
) -> TransformChoice:
    """The rotation of ConvRot (2512.03673): a regular Hadamard matrix over blocks of channels.

    Other engines read files with this rotation. dtq stores it as signs and its own Hadamard
    transform; what is left of the regular matrix, a signed permutation of the rotated channels,
    changes no product (:func:`dtq.linalg.hadamard.regular_signs`).

    Args:
        weights: float matrices (N_i, K) that read the input.
        stats: not used.
        fmt: not used.
        activations: not used.
        block: largest block; the largest power of four up to it that divides K is taken, 256 in the
            files of ComfyUI.

    Returns:
        The rotation; the identity if 4 does not divide K.
    """
    columns = weights[0].shape[1]
    n = regular_block_for(columns, block)
    if n == 1:
        return TransformChoice(online_transform(weights[0], None), "none")
    scale = regular_signs(n).repeat(columns // n).to(weights[0].device, torch.bfloat16)
    return TransformChoice(OnlineTransform(scale, n), f"convrot {n}")


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
    """Static channel balancing, then rotation (ViDiT-Q, 2406.02540, sec. 3.3).

    Args:
        weights: float matrices (N_i, K) that read the input.
        stats: statistics of the input: channels.
        fmt: not used.
        activations: not used.
        alpha: how much of the activation's range moves into the weight, 0 to 1.
        reduce: reduction of the channel amax over timestep bins, a key of ``REDUCTIONS``.
        block: largest Hadamard block.
        seed: of the random signs.

    Returns:
        Smoothing and rotation.
    """
    n = block_for(weights[0].shape[1], block)
    s = smoothing(weights, stats, alpha=alpha, reduce=reduce)
    label = f"smooth({alpha:g}, {reduce}) + hadamard {n}"
    return TransformChoice(online_transform(weights[0], s, n, seed), label)


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

    Alpha runs over [0, 1] and is chosen by the squared output error of the layer with weights and
    activations quantized. The identity is a candidate, too. Smoothing comes before the weight is
    quantized; the released code smooths the quantized weight.

    Args:
        weights: float matrices (N_i, K) that read the input.
        stats: statistics of the input: channels and a sample of rows.
        fmt: weight format.
        activations: format of the transformed input.
        step: spacing of alpha.
        reduce: reduction of the channel amax over timestep bins, a key of ``REDUCTIONS``.
        num_rows: input rows that candidates are evaluated on.

    Returns:
        The choice with the lowest error; ``errors`` has the kinds ``none`` and ``smooth``.
    """
    objective = OutputErrorObjective(weights, stats, fmt, activations, num_rows)
    best = online_transform(weights[0], None)
    label, errors = "none", {"none": objective(best)}
    lowest = errors["none"]
    for i in range(round(1 / step) + 1):
        s = smoothing(weights, stats, alpha=i * step, reduce=reduce)
        transform = online_transform(weights[0], s)
        error = objective(transform)
        errors["smooth"] = min(error, errors.get("smooth", error))
        if error < lowest:
            lowest, best, label = error, transform, f"smooth({i * step:.2f}, {reduce})"
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
    """LRQ-DiT's adaptive rotation scheme (2508.03485): one Hadamard rotation, or two if needed.

    The paper rotates twice, with an outlier-aware permutation, where ``|X|_F / sqrt(numel)`` is
    large. That choice depends on the scale of the activation. Here the criterion is the
    incoherence of the rows after one rotation, the mean over rows of ``max|x| / rms(x)``: above
    ``limit`` there is a second one. The permutation before it assigns channels, largest amax first,
    to the blocks in zigzag order (DuQuant, 2406.01721, sec. 3.2), so that outliers are spread over
    the blocks. A Hadamard transform, which spreads a single outlier evenly, replaces DuQuant's
    greedy rotation.

    Args:
        weights: float matrices (N_i, K) that read the input.
        stats: statistics of the input: channels and a sample of rows.
        fmt: not used.
        activations: not used.
        alpha: of the smoothing that comes first; 0.5 in every released script.
        reduce: reduction of the channel amax over timestep bins, a key of ``REDUCTIONS``.
        limit: incoherence above which there are two rotations. Gaussian rows have about 3.
        block: largest Hadamard block.
        seed: of the random signs.

    Returns:
        Smoothing, maybe a permutation, and one or two rotations.
    """
    w = weights[0]
    n = block_for(w.shape[1], block)
    s = smoothing(weights, stats, alpha=alpha, reduce=reduce)
    once = online_transform(w, s, n, seed)
    label = f"smooth({alpha:g}, {reduce})"
    if n == 1:
        return TransformChoice(once, label)
    assert stats.sample is not None
    rows = stats.sample.rows.to(w.device)
    if incoherence(once.x(rows)) <= limit:
        return TransformChoice(once, f"{label} + hadamard {n}")
    perm = zigzag((rows / s).abs().amax(0), n)
    twice = online_transform(w, s, n, seed, perm, num_rotations=2)
    return TransformChoice(twice, f"{label} + dual hadamard {n}")


def incoherence(rows: Tensor) -> float:
    """Mean over rows (R, K) of the largest magnitude over the root mean square.

    It does not depend on the scale of the rows.
    """
    rms = rows.square().mean(-1).sqrt().clamp(min=1e-30)
    return float((rows.abs().amax(-1) / rms).mean())


def zigzag(amax: Tensor, block: int) -> Tensor:
    """Distribute channels, largest amax first, over the blocks, back and forth.

    Args:
        amax: largest magnitude of each channel, float (K,).
        block: channels per block; divides K.

    Returns:
        int64 (K,), the channel that moves to each position.
    """
    blocks = len(amax) // block
    rounds = torch.argsort(amax, descending=True, stable=True).reshape(block, blocks)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)
