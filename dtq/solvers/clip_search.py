# SPDX-License-Identifier: Apache-2.0
"""Clip search: a narrower range has a finer step, at the cost of the few weights outside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtq.formats import Format, QParams, fake_quantize_weight
from dtq.formats.groups import in_groups
from dtq.solvers.finite import check

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
ROW_CLIPS = (*CLIPS, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
"""The largest weight of a row lies further out than that of a group, the more so in heavy tails."""

_CHUNK = 2**17  # weights that are evaluated at once: more would leave the cache


def search(
    w: Tensor, fmt: Format, hessian: Tensor | None = None, *, clips: Sequence[float] | None = None
) -> tuple[Tensor, QParams]:
    """Choose the clip with the lowest squared error for every row or group, then round to nearest.

    Args:
        w: float (N, K).
        fmt: the format. A data-dependent one has no clip; it minimizes the same error once.
        hessian: of the input (K, K); its diagonal weights the squared errors of the columns.
            None: all columns count the same.
        clips: fractions of the range to try. None: ``CLIPS`` for groups, ``ROW_CLIPS`` for rows.

    Returns:
        The fake-quantized weight, float32 (N, K), and its parameters.

    Raises:
        InputError: a weight or an entry of the Hessian is not finite.
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
    """Parameters with the best clip for every row and group.

    A data-dependent format has no clip. Its fit is a local optimum, so the fit without
    ``column_weights`` is a candidate, too: the search is never worse than plain rounding.

    Args:
        w: float (N, columns), a matrix or whole groups of one.
        fmt: the format.
        column_weights: weight of each column's squared error (columns,); None: all the same.
        clips: fractions of the range to try; None: ``CLIPS`` for groups, ``ROW_CLIPS`` for rows.
        outer: parameters of the whole matrix, see :meth:`Format.compute_qparams`.

    Returns:
        The parameters.
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
        # parameters above the groups depend on whole rows, not on clips
        outer = fmt.compute_qparams(w, column_weights)
    fractions, best = torch.tensor(list(clips)).to(w), []
    for start in range(0, len(w), rows := max(1, _CHUNK // w.shape[1])):
        chunk, chunk_errors = w[start : start + rows], []
        chunk_outer = _select_rows(outer, slice(start, start + rows), len(w))
        for batch in fractions.split(max(1, _CHUNK // chunk.numel())):
            # one copy of the chunk per clip, one below the other: rows are independent
            copies = chunk.repeat(len(batch), 1)
            clip = batch.repeat_interleave(len(chunk)).unsqueeze(1)
            copies_outer = _repeat_rows(chunk_outer, len(chunk), len(batch))
            params = fmt.compute_qparams(copies, column_weights, clip=clip, outer=copies_outer)
            chunk_errors.append(errors(copies, params).unflatten(0, (len(batch), -1)))
        best.append(torch.cat(chunk_errors).argmin(0))  # (rows, groups); of equals the widest range
    return fmt.compute_qparams(w, column_weights, clip=fractions[torch.cat(best)], outer=outer)


def _select_rows(outer: QParams | None, rows: slice, count: int) -> QParams | None:
    """The parameters of some of ``count`` rows; those of the whole matrix stay."""
    if outer is None:
        return None
    return {k: v[rows] if v.shape == (count, 1) else v for k, v in outer.items()}


def _repeat_rows(outer: QParams | None, rows: int, times: int) -> QParams | None:
    """The parameters of ``times`` copies of the ``rows``, one below the other."""
    if outer is None:
        return None
    return {k: v.repeat(times, 1) if v.shape == (rows, 1) else v for k, v in outer.items()}
