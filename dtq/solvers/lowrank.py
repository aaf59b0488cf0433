# SPDX-License-Identifier: Apache-2.0
"""``LOWRANK``: a 16-bit branch of low rank beside the weight, ``W = L + residual``.

Each function takes the changed weights of the linears that share an input and returns one
:class:`Branch` a linear; what it leaves is then solved as any weight. The branch reads the raw
input, which is not quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtq.formats import Format
from dtq.solvers.clip_search import search

_EXACT = 2048  # up to this size a full decomposition, above it a randomised one


@dataclass(frozen=True)
class LowRankBranch:
    """``L = up @ down``; up float (N, r), down float (r, K), both rounded to bfloat16 values."""

    up: Tensor
    down: Tensor

    def matrix(self) -> Tensor:
        return self.up @ self.down


def svd(
    weights: Sequence[Tensor],
    fmt: Format,
    hessian: Tensor | None = None,
    *,
    rank: int = 32,
    bits: float = 0.0,
    iterations: int = 8,
    share: bool = False,
    weighted: bool = True,
) -> list[LowRankBranch]:
    """SVDQuant's branch (2411.05007, sec. 4.2): decompose the weight, then quantize what is left.

    Alternates ``L = SVD_r(W - Q(W - L))`` and keeps the branch with the least output error
    ``tr(D H D^T)``, D what branch and quantized residual together miss; stops when a round does
    not improve. The first round is the decomposition of the weight itself.

    Args:
        weights: float (N_i, K) each, in the space of the changed input.
        fmt: format of the residual.
        hessian: second moment of the changed input (K, K); None: the identity.
        rank: of the branch; used when ``bits`` is 0.
        bits: room for the branch in bits per weight, which sets the rank by the shape.
        iterations: rounds after the first.
        share: one ``down`` for all weights, as fused kernels for q, k, v want it.
        weighted: also decompose in the metric of ``hessian`` (ours; the paper's is plain) and keep
            the better: what a branch takes out of the weight is not what rounding loses.
    """
    groups = [list(weights)] if share else [[w] for w in weights]
    found: list[LowRankBranch] = []
    for members in groups:
        joint, r = torch.cat(members), _rank_of(members[0], rank, bits)
        factors = [None] if hessian is None or not weighted else [None, _factor(hessian, joint)]
        best: LowRankBranch | None = None
        least = math.inf
        for factor in factors:
            kept, last = torch.zeros_like(joint), math.inf
            for _ in range(iterations + 1):
                branch = _decompose(joint - kept, r, factor)
                kept, _ = search(joint - branch.matrix(), fmt, hessian)
                error = _error(joint - branch.matrix() - kept, hessian)
                if error < least:
                    least, best = error, branch
                if error >= last:
                    break
                last = error
        assert best is not None
        sizes = [len(w) for w in members]
        found += [LowRankBranch(up, best.down) for up in best.up.split(sizes)]
    return found


def loftq(
    weights: Sequence[Tensor],
    fmt: Format,
    hessian: Tensor | None = None,
    *,
    rank: int = 32,
    bits: float = 0.0,
    iterations: int = 10,
) -> list[LowRankBranch]:
    """DiTAS' compensation (2409.07756, sec. 3.4): quantize first, decompose the error, repeat.

    Of the rounds, the branch with the least weight error is kept; the paper takes the last.
    """
    found = []
    for w in weights:
        best, least = None, math.inf
        low = torch.zeros_like(w)
        for _ in range(iterations):
            kept, _ = search(w - low, fmt)
            branch = _decompose(w - kept, _rank_of(w, rank, bits), None)
            low = branch.matrix()
            error = _error(w - low - search(w - low, fmt)[0], None)
            if error < least:
                least, best = error, branch
        assert best is not None
        found.append(best)
    return found


@dataclass(frozen=True)
class LowRank:
    """A row of the table: the function, and what calibration must collect for it."""

    call: Callable[..., list[LowRankBranch]]
    needs: frozenset[str] = frozenset()


LOWRANK: dict[str, LowRank] = {
    "svd": LowRank(svd, frozenset({"hessian"})),
    "loftq": LowRank(loftq),
}


def rank_for(shape: tuple[int, int], knobs: Mapping[str, Any]) -> int:
    """Rank that a call with these knobs gives a linear (N, K); ``bits`` sets it by the shape."""
    rows, columns = shape
    if knobs.get("bits"):
        rank = int(knobs["bits"] * rows * columns / (16 * (rows + columns)))
        return max(1, min(rank, rows, columns))
    return min(int(knobs.get("rank", 32)), rows, columns)


def _rank_of(w: Tensor, rank: int, bits: float) -> int:
    return rank_for((w.shape[0], w.shape[1]), {"rank": rank, "bits": bits})


def _factor(hessian: Tensor, w: Tensor) -> Tensor:
    """Lower Cholesky factor of the damped hessian: ``|D S|^2 = tr(D H D^T)``."""
    h = hessian.double()
    mean = h.diagonal().mean().clamp(min=1e-30)
    eye = torch.eye(len(h), dtype=torch.float64, device=h.device)
    lower: Tensor = torch.linalg.cholesky(h + 1e-2 * mean * eye).to(w)
    return lower


def _decompose(w: Tensor, rank: int, factor: Tensor | None) -> LowRankBranch:
    """The branch nearest to ``w`` (N, K), in the metric of ``factor`` when there is one."""
    target = w if factor is None else w @ factor
    if min(target.shape) <= _EXACT:
        u, s, v = torch.linalg.svd(target, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(target, q=rank + 8, niter=4)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank].T
    root = s.sqrt()
    down = root.unsqueeze(1) * v
    if factor is not None:
        down = torch.linalg.solve_triangular(factor, down, upper=False, left=False)
    return LowRankBranch((u * root).bfloat16().to(w), down.bfloat16().to(w))


def _error(d: Tensor, hessian: Tensor | None) -> float:
    return float(d.square().sum() if hessian is None else ((d @ hessian.to(d)) * d).sum())
