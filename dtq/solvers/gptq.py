# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round column by column, and let the columns still to come repair each error."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dtq.formats import Format, QParams, fake_quantize_weight
from dtq.linalg.cholesky import _inverse_factor
from dtq.solvers.clip_search import fit_clipped
from dtq.solvers.finite import check

log = logging.getLogger("dtq")


def gptq(
    w: Tensor,
    fmt: Format,
    hessian: Tensor | None = None,
    factors: dict[float, Tensor] | None = None,
    *,
    damp: float = 0.01,
    block: int = 128,
    clip: bool = True,
) -> tuple[Tensor, QParams]:
    """Minimise ``tr(D H D^T)``, D the weight error, H the second moment of the input.

    GPTQ (2210.17323, algorithm 1) with the parameters of a group fitted when the group is
    entered, on the columns as repaired so far, by clip search weighted with diag(H). Errors are
    those of the format's own grid, so a two-level format repairs its second rounding too. A format
    that codes several columns together snaps them as repaired so far, then hands their errors on
    one by one (GPTVQ, 2402.15319, algorithm 1).

    Args:
        w: float (N, K).
        fmt: any format; groups must divide ``block`` or the other way round.
        hessian: H, float (K, K). None gives what the identity does: clip search alone.
        factors: what was worked out of ``hessian`` alone, by ``damp``; kept here for the next weight
            that reads the same input.
        damp: added to the diagonal, as a share of its mean; raised tenfold until H factors.
        block: columns that are repaired at once.
        clip: search the clip of each group; otherwise the full range.

    Returns:
        The w_q weight (N, K) and its parameters.

    Raises:
        InputError: a weight or a moment is not finite, or H is not positive.
    """
    check(w, hessian)
    clips = None if clip else (1.0,)
    todo = w.float().clone()
    factors = {} if factors is None else factors
    if hessian is not None and damp not in factors:
        factors[damp] = _inverse_factor(hessian.to(todo), damp)
    inverse = None if hessian is None else factors[damp]
    column_weights = (
        torch.ones(w.shape[1]).to(todo) if hessian is None else hessian.diagonal().to(todo)
    )
    # groups are fitted when they are entered: of them only what is the whole row's is wanted here
    if fmt.data_dependent or fmt.group is None:
        params = fit_clipped(todo, fmt, column_weights, clips=clips)
    else:
        params = fmt.compute_qparams(todo, column_weights)
    group = fmt.group or todo.shape[1]
    done = torch.zeros_like(todo)
    width = max(block, fmt.group or 0) // (fmt.group or 1) * (fmt.group or 1)
    steps = None if inverse is None else inverse.diagonal().unbind()
    for start in range(0, todo.shape[1], width):
        stop = min(start + width, todo.shape[1])
        # a column of the matrix is a row here: what one step reads lies together
        ahead = todo[:, start:stop].T.contiguous()  # (columns, N)
        errors = torch.zeros_like(ahead)
        for j in range(start, stop, fmt.vector):
            if fmt.group is not None and j % group == 0:
                cols = slice(j, j + group)
                now = ahead[j - start : j - start + group].T.contiguous()
                part = fit_clipped(now, fmt, column_weights[cols], clips=clips, outer=params)
                _put(params, part, j // group)
            cols = slice(j, j + fmt.vector)
            now = ahead[j - start : j - start + fmt.vector]  # (vector, N)
            kept = fmt.fake_quantize(now.T.contiguous(), params, cols)
            done[:, cols] = kept
            if inverse is None or steps is None:
                continue  # nothing says which columns could repair the error
            for i, column in zip(range(j, j + fmt.vector), kept.T, strict=True):
                error = torch.sub(ahead[i - start], column, out=errors[i - start])
                error.div_(steps[i])
                ahead[i - start + 1 :] -= inverse[i, i + 1 : stop].unsqueeze(1) * error
        if inverse is not None:
            todo[:, stop:].addmm_(errors.T, inverse[start:stop, stop:], alpha=-1)
    return fake_quantize_weight(fmt, done, params), params


def _put(qparams: QParams, part: QParams, index: int) -> None:
    """Write the parameters of one group into those of the matrix; wider ones are equal."""
    for key, value in part.items():
        if qparams[key].shape[1] == value.shape[1]:  # the whole row's, or there is one group only
            qparams[key] = value
        else:
            qparams[key][:, index : index + 1] = value
