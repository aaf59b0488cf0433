# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round column by column, and let the remaining columns compensate each error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtq.formats import Format, QParams, fake_quantize_weight
from dtq.linalg.cholesky import inverse_factor
from dtq.solvers.clip_search import fit_clipped
from dtq.solvers.finite import check


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
    """Minimize ``tr(D H D^T)``, D the weight error, H the Hessian of the input.

    GPTQ (2210.17323, algorithm 1). The parameters of a group are computed when the group is
    reached, from the columns as compensated so far, by clip search weighted with diag(H). Errors
    are those of the format itself, so the second rounding of a two-level format is compensated,
    too. A format that quantizes several columns together rounds them as compensated so far, then
    passes their errors on one by one (GPTVQ, 2402.15319, algorithm 1).

    Args:
        w: float (N, K).
        fmt: any format; its group must divide ``block``, or be a multiple of it.
        hessian: H, float (K, K). None: no errors are compensated, and only the clip search remains.
        factors: cache of the Cholesky factor of the inverse of ``hessian``, by ``damp``; filled
            here for the next weight that reads the same input.
        damp: added to the diagonal of H, as a fraction of its mean; 0.01 is the paper's. It is
            raised tenfold until H can be factored.
        block: columns between updates of all columns behind them; 128 is the paper's.
        clip: search the clip of each row or group; otherwise keep the full range.

    Returns:
        The fake-quantized weight, float32 (N, K), and its parameters.

    Raises:
        InputError: an entry of ``w`` or H is not finite, or H is not positive definite.
    """
    check(w, hessian)
    clips = None if clip else (1.0,)
    inverse, column_weights = factored(w, hessian, factors, damp)
    params = starting_params(w.float(), fmt, column_weights, clips)
    out = round_columns(w, fmt, params, column_weights, inverse, clips=clips, block=block)
    return fake_quantize_weight(fmt, out, params), params


def factored(
    w: Tensor, hessian: Tensor | None, factors: dict[float, Tensor] | None, damp: float
) -> tuple[Tensor | None, Tensor]:
    """What :func:`round_columns` needs of the Hessian.

    Args:
        w: float (N, K).
        hessian: H, float (K, K), or None.
        factors: see :func:`gptq`.
        damp: see :func:`gptq`.

    Returns:
        The upper Cholesky factor of its inverse (K, K), None without a Hessian; its diagonal (K,).
    """
    if hessian is None:
        return None, torch.ones(w.shape[1]).to(w.float())
    factors = {} if factors is None else factors
    if damp not in factors:
        factors[damp] = inverse_factor(hessian.to(w.float()), damp)
    return factors[damp], hessian.diagonal().to(w.float())


def starting_params(
    w: Tensor, fmt: Format, column_weights: Tensor, clips: Sequence[float] | None
) -> QParams:
    """The parameters before the first column; those of groups follow when a group is reached.

    Args:
        w: float32 (N, K).
        fmt: any format.
        column_weights: weight of each column's squared error (K,).
        clips: of the clip search.
    """
    if fmt.data_dependent or fmt.group is None:
        return fit_clipped(w, fmt, column_weights, clips=clips)
    return fmt.compute_qparams(w, column_weights)


def round_columns(
    w: Tensor,
    fmt: Format,
    params: QParams,
    column_weights: Tensor,
    inverse: Tensor | None,
    *,
    clips: Sequence[float] | None,
    block: int,
) -> Tensor:
    """Round a weight column by column; ``params`` gets the parameters of its groups.

    Args:
        w: float (N, K).
        fmt: any format.
        params: from :func:`starting_params`; changed in place.
        column_weights: weight of each column's squared error (K,).
        inverse: from :func:`factored`; None: no errors are compensated.
        clips: of the clip search in each group.
        block: columns between updates of all columns behind them.

    Returns:
        The fake-quantized weight, float32 (N, K).
    """
    rest = w.float().clone()  # the columns to come, as compensated so far
    out = torch.zeros_like(rest)
    width = max(block, fmt.group or 0) // (fmt.group or 1) * (fmt.group or 1)
    for start in range(0, rest.shape[1], width):
        cols = slice(start, min(start + width, rest.shape[1]))
        out[:, cols], errors = _quantize_block(
            rest[:, cols], cols, fmt, params, column_weights, clips, inverse
        )
        if inverse is not None:
            rest[:, cols.stop :].addmm_(errors.T, inverse[cols, cols.stop :], alpha=-1)
    return out


def _quantize_block(
    rest: Tensor,
    cols: slice,
    fmt: Format,
    params: QParams,
    column_weights: Tensor,
    clips: Sequence[float] | None,
    inverse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Quantize columns ``cols``; ``params`` gets the parameters of their groups.

    Returns:
        The fake-quantized columns (N, columns); their errors, divided by the diagonal of
        ``inverse``, (columns, N).
    """
    out = torch.zeros_like(rest)
    columns = rest.T.contiguous()  # (columns, N): each step reads a contiguous row
    errors = torch.zeros_like(columns)
    steps = () if inverse is None else inverse.diagonal()[cols].unbind()
    for j in range(0, len(columns), fmt.vector):
        first = cols.start + j
        if fmt.group is not None and first % fmt.group == 0:
            group_weights = column_weights[first : first + fmt.group]
            group = columns[j : j + fmt.group].T.contiguous()
            fitted = fit_clipped(group, fmt, group_weights, clips=clips, outer=params)
            _set_group(params, fitted, first // fmt.group)
        x = columns[j : j + fmt.vector].T.contiguous()  # (N, vector)
        w_q = fmt.fake_quantize(x, params, slice(first, first + fmt.vector))
        out[:, j : j + fmt.vector] = w_q
        if inverse is None:
            continue  # without a Hessian no column can compensate an error
        for i, column in enumerate(w_q.T, start=j):
            error = torch.sub(columns[i], column, out=errors[i]).div_(steps[i])
            remaining = inverse[cols.start + i, cols.start + i + 1 : cols.stop]
            columns[i + 1 :] -= remaining.unsqueeze(1) * error
    return out, errors


def _set_group(qparams: QParams, fitted: QParams, index: int) -> None:
    """Write the parameters of one group into those of the matrix; wider ones are equal."""
    for key, value in fitted.items():
        width = value.shape[1]  # more than 1 where a group has groups of its own
        if qparams[key].shape[1] == width:  # of the whole row, or there is only one group
            qparams[key] = value
        else:
            qparams[key][:, index * width : (index + 1) * width] = value
