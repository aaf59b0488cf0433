# SPDX-License-Identifier: Apache-2.0
"""Clip search: a narrower range rounds the many better and the few worse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtq.formats import Format, QParams, fake_quantize_weight
from dtq.formats.groups import in_groups
from dtq.solvers.finite import check

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
ROW_CLIPS = (*CLIPS, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
"""The largest of a row lies further out than the largest of a group, the more so in heavy tails."""

_TOGETHER = 2**17  # weights that are tried at once: more would leave the cache


def search(
    w: Tensor, fmt: Format, hessian: Tensor | None = None, *, clips: Sequence[float] | None = None
) -> tuple[Tensor, QParams]:
    """Choose the clip of every group that has the least squared error, then round to nearest.

    Args:
        w: float (N, K).
        fmt: the format; one that learns its levels is fitted once, by the same weighted error.
        hessian: second moment of the input (K, K); its diagonal weighs the columns. None: all alike.
        clips: shares of the range to try; by default those that suit a row or a group.

    Returns:
        The w_q weight (N, K) and its parameters.
    """
    check(w, hessian)
    column_weights = None if hessian is None else hessian.diagonal()
    params = fit_clipped(w, fmt, column_weights, clips=clips)
    return fake_quantize_weight(fmt, w, params), params


def fit_clipped(
    w: Tensor,
    fmt: Format,
    column_weights: Tensor | None = None,
    *,
    clips: Sequence[float] | None = None,
    outer: QParams | None = None,
) -> QParams:
    """Parameters with the best clip for every row and group of ``w``, whole groups of columns.

    A format that learns its levels has no clip. What it finds is a local optimum, so the fit
    without column_weights stands as a candidate: search never loses to plain rounding.
    """
    weight = torch.ones(w.shape[1]).to(w) if column_weights is None else column_weights.to(w)

    def errors(w: Tensor, params: QParams) -> Tensor:
        return in_groups((fmt.fake_quantize(w, params) - w).square() * weight, fmt.group).sum(-1)

    if fmt.data_dependent:
        params = fmt.compute_qparams(w, column_weights, outer=outer)
        if column_weights is None or outer is not None:
            return params
        plain = fmt.compute_qparams(w)
        return plain if errors(w, plain).sum() < errors(w, params).sum() else params
    if clips is None:
        clips = ROW_CLIPS if fmt.group is None else CLIPS
    if fmt.group is not None and outer is None:
        outer = fmt.compute_qparams(
            w, column_weights
        )  # what lies above groups depends on all rows, not on clips
    shares, best = torch.tensor(list(clips)).to(w), []
    for first in range(0, len(w), rows := max(1, _TOGETHER // w.shape[1])):
        part, tries = w[first : first + rows], []
        above = _rows(outer, slice(first, first + rows), len(w))
        for some in shares.split(max(1, _TOGETHER // part.numel())):
            # one matrix below the other, each with its clip: rows do not see each other
            many = part.repeat(len(some), 1)
            clip = some.repeat_interleave(len(part)).unsqueeze(1)
            params = fmt.compute_qparams(
                many, column_weights, clip=clip, outer=_below(above, len(part), len(some))
            )
            tries.append(errors(many, params).unflatten(0, (len(some), -1)))
        best.append(torch.cat(tries).argmin(0))  # (rows, groups); the widest range wins ties
    return fmt.compute_qparams(w, column_weights, clip=shares[torch.cat(best)], outer=outer)


def _rows(outer: QParams | None, rows: slice, count: int) -> QParams | None:
    """The parameters of some of ``count`` rows; what is the whole matrix's stays."""
    if outer is None:
        return None
    return {k: v[rows] if v.shape == (count, 1) else v for k, v in outer.items()}


def _below(outer: QParams | None, rows: int, times: int) -> QParams | None:
    """The parameters of whole rows for ``times`` copies of the matrix, one below the other."""
    if outer is None:
        return None
    return {k: v.repeat(times, 1) if v.shape == (rows, 1) else v for k, v in outer.items()}
