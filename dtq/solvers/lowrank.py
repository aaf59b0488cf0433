# SPDX-License-Identifier: Apache-2.0
"""Low-rank branches: ``W = L + residual`` with a 16-bit L of low rank (``LOWRANK``).

Each function takes the transformed weights of the linears that read one input, and returns one
:class:`LowRankBranch` per linear. The residual is then solved like any weight. The branch reads the
raw input, which is not quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dtq.formats import Format
from dtq.solvers.clip_search import search

_EXACT = 2048  # up to this size a full decomposition, above it a randomized one


@dataclass(frozen=True)
class LowRankBranch:
    """``L = up @ down``.

    Attributes:
        up: float (N, r), rounded to bfloat16 values.
        down: float (r, K), likewise.
    """

    up: Tensor
    down: Tensor

    def matrix(self) -> Tensor:
        """L, float (N, K)."""
        return self.up @ self.down


_Round = tuple[float, LowRankBranch]
"""The output error of a branch, and the branch."""


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
    """SVDQuant's branch (2411.05007, sec. 4.2): decompose the weight, then quantize the residual.

    Alternates ``L = SVD_r(W - Q(W - L))`` and keeps the branch with the lowest output error
    ``tr(D H D^T)``, D the error of branch and quantized residual together. It stops when a round
    does not improve. The first round decomposes the weight itself.

    Args:
        weights: float (N_i, K) each, of the transformed input.
        fmt: format of the residual.
        hessian: H of the transformed input (K, K); None: the identity.
        rank: of the branch, if ``bits`` is 0. 32 is the paper's.
        bits: size of the branch in bits per weight, which sets the rank by the shape.
        iterations: rounds after the first.
        share: one ``down`` for all weights, as fused kernels for q, k, v need it.
        weighted: also decompose in the metric of ``hessian`` (ours; the paper's is plain), and keep
            the better: what a branch takes out of the weight is not what rounding loses.

    Returns:
        One branch per weight.
    """
    branches: list[LowRankBranch] = []
    for group in [list(weights)] if share else [[w] for w in weights]:
        joint, r = torch.cat(group), _rank_of(group[0], rank, bits)
        factors = [None] if hessian is None or not weighted else [None, _factor(hessian, joint)]
        nothing = torch.zeros_like(joint)
        rounds = (_rounds(joint, nothing, r, fmt, hessian, factor) for factor in factors)
        candidates = [_best(_until_it_rises(islice(x, iterations + 1))) for x in rounds]
        best = _best(candidates)[1]
        branches += [LowRankBranch(up, best.down) for up in best.up.split([len(w) for w in group])]
    return branches


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

    Keeps the branch of the round with the lowest weight error; the paper takes the last.

    Args:
        weights: float (N_i, K) each, of the transformed input.
        fmt: format of the residual.
        hessian: not used: the error is that of the weight.
        rank: of the branch, if ``bits`` is 0.
        bits: size of the branch in bits per weight, which sets the rank by the shape.
        iterations: rounds, at least 1.

    Returns:
        One branch per weight.
    """
    branches = []
    for w in weights:
        rounds = _rounds(w, search(w, fmt)[0], _rank_of(w, rank, bits), fmt, None, None)
        branches.append(_best(islice(rounds, iterations))[1])
    return branches


def _rounds(
    w: Tensor, w_q: Tensor, rank: int, fmt: Format, hessian: Tensor | None, factor: Tensor | None
) -> Iterator[_Round]:
    """Decompose what ``w_q`` leaves of the weight, then round what the branch leaves, and so on."""
    while True:
        branch = _decompose(w - w_q, rank, factor)
        residual = w - branch.matrix()
        w_q, _ = search(residual, fmt, hessian)
        yield _error(residual - w_q, hessian), branch


def _until_it_rises(rounds: Iterable[_Round]) -> Iterator[_Round]:
    """Rounds up to the first whose error is not lower than the one before."""
    last = math.inf
    for error, branch in rounds:
        yield error, branch
        if error >= last:
            break
        last = error


def _best(rounds: Iterable[_Round]) -> _Round:
    return min(rounds, key=lambda each: each[0])


@dataclass(frozen=True)
class LowRank:
    """A row of the table.

    Attributes:
        call: the function.
        needs: names of the statistics that calibration must collect for it.
    """

    call: Callable[..., list[LowRankBranch]]
    needs: frozenset[str] = frozenset()


LOWRANK = {"svd": LowRank(svd, frozenset({"hessian"})), "loftq": LowRank(loftq)}


def rank_for(shape: tuple[int, int], knobs: Mapping[str, Any]) -> int:
    """Rank of the branch of a linear (N, K) for the knobs of a method.

    ``bits`` bits per weight, if not 0, pay for 16-bit factors (N, r) and (r, K); otherwise it is
    ``rank``.
    """
    rows, columns = shape
    if knobs.get("bits"):
        rank = int(knobs["bits"] * rows * columns / (16 * (rows + columns)))
        return max(1, min(rank, rows, columns))
    return min(int(knobs.get("rank", 32)), rows, columns)


def _rank_of(w: Tensor, rank: int, bits: float) -> int:
    return rank_for((w.shape[0], w.shape[1]), {"rank": rank, "bits": bits})


def _factor(hessian: Tensor, w: Tensor) -> Tensor:
    """Lower Cholesky factor S of the damped Hessian: ``|D S|^2 = tr(D H D^T)``."""
    h = hessian.double()
    mean = h.diagonal().mean().clamp(min=1e-30)
    eye = torch.eye(len(h), dtype=torch.float64, device=h.device)
    lower: Tensor = torch.linalg.cholesky(h + 1e-2 * mean * eye).to(w)
    return lower


def _decompose(w: Tensor, rank: int, factor: Tensor | None) -> LowRankBranch:
    """The branch nearest to ``w`` (N, K), in the metric of ``factor`` if there is one."""
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
