# SPDX-License-Identifier: Apache-2.0
"""GPTQ with feedback between output channels, too: the objective of YAQA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtq.formats import Format, QParams, fake_quantize_weight
from dtq.linalg.cholesky import inverse_factor
from dtq.solvers.finite import check
from dtq.solvers.gptq import factored, gptq, round_columns, starting_params


def yaqa(
    w: Tensor,
    fmt: Format,
    hessian: Tensor | None = None,
    factors: dict[float, Tensor] | None = None,
    gradients: Sequence[Tensor] = (),
    *,
    damp: float = 0.01,
    output_damp: float = 0.1,
    parts: int = 8,
    block: int = 128,
    clip: bool = True,
) -> tuple[Tensor, QParams]:
    """Minimize ``tr(G D H D^T)``, D the weight error, H and G of the layer's input and output.

    YAQA (2505.22988) approximates the Hessian of the model's output error with respect
    to a weight by the Kronecker product of H, the second moment of the layer's input, and G, the
    second moment of the gradient with respect to its output. Errors of columns are compensated in
    later columns as in :func:`~dtq.solvers.gptq.gptq`; then those of rows in later rows, by the
    Cholesky factor of ``G^-1``. Where the paper rounds entry by entry, here ``parts`` of the rows
    are rounded one after another: a part is every ``parts``-th row.

    Args:
        w: float (N, K).
        fmt: any format.
        hessian: H, float (K, K). Without it, or without ``gradients``, this is ``gptq``.
        factors: as for ``gptq``.
        gradients: blocks of G, float (n, n) each. Block i of C has rows ``i::C`` of ``w``;
            between blocks no errors are compensated.
        damp: as for ``gptq``.
        output_damp: added to the diagonal of G, as a fraction of its mean.
        parts: of the rows of a block.
        block: as for ``gptq``.
        clip: as for ``gptq``.

    Returns:
        The fake-quantized weight, float32 (N, K), and its parameters.

    Raises:
        InputError: an entry of ``w``, H or G is not finite, or one of these is not positive
            definite.
        ValueError: the blocks of G have other rows than ``w``.
    """
    if hessian is None or not gradients:
        return gptq(w, fmt, hessian, factors, damp=damp, block=block, clip=clip)
    check(w, hessian, *gradients)
    rest, count = w.float().clone(), len(gradients)
    rows = [torch.arange(i, len(w), count, device=w.device) for i in range(count)]
    if [len(r) for r in rows] != [len(g) for g in gradients]:
        sizes = ", ".join(str(len(g)) for g in gradients)
        raise ValueError(f"blocks of G with {sizes} rows for a weight with {len(w)}")
    clips = None if clip else (1.0,)
    inverse, column_weights = factored(w, hessian, factors, damp)
    params = starting_params(rest, fmt, column_weights, clips)
    by_row = _by_row(params, fmt, w)
    feedback = [
        _Feedback(block_rows, g.to(rest), parts, output_damp)
        for block_rows, g in zip(rows, gradients, strict=True)
    ]
    out = torch.zeros_like(rest)
    for i in range(parts):
        # blocks do not depend on each other, so that a part is that of all of them
        chosen = torch.cat([each.parts[i] for each in feedback])
        if not len(chosen):
            break
        if fmt.matrix_tensors:  # one for all rows: that of the whole matrix stays
            part = {k: v[chosen] if k in by_row else v for k, v in params.items()}
        else:
            part = starting_params(rest[chosen], fmt, column_weights, clips)
        out[chosen] = round_columns(
            rest[chosen], fmt, part, column_weights, inverse, clips=clips, block=block
        )
        for key in by_row:
            params[key][chosen] = part[key]
        for each in feedback:
            each.compensate(rest, out, i)
    return fake_quantize_weight(fmt, out, params), params


class _Feedback:
    """Errors of the rows of one block of G are compensated in its later rows.

    Args:
        rows: of the weight, int64 (n,).
        g: the block of G, float32 (n, n).
        parts: the rows in so many parts, each ``parts``-th row in one.
        damp: of ``g``.
    """

    def __init__(self, rows: Tensor, g: Tensor, parts: int, damp: float) -> None:
        self.parts = [rows[i::parts] for i in range(parts)]
        order = torch.cat([torch.arange(len(g))[i::parts] for i in range(parts)]).to(g.device)
        self.later = rows[order]
        self.factor = inverse_factor(g[order][:, order], damp)

    def compensate(self, rest: Tensor, out: Tensor, index: int) -> None:
        """Change the later rows of ``rest`` after part ``index`` was rounded to ``out``."""
        chosen, size = self.parts[index], len(self.parts[index])
        errors = rest[chosen] - out[chosen]
        solved = torch.linalg.solve_triangular(self.factor[:size, :size].T, errors, upper=False)
        self.later = self.later[size:]
        rest[self.later] -= self.factor[:size, size:].T @ solved
        self.factor = self.factor[size:, size:]


def _by_row(params: QParams, fmt: Format, w: Tensor) -> set[str]:
    """The parameters that have a value for each row, be it the same for all."""
    sizes = [fmt.tensor_specs((rows, w.shape[1])) for rows in (len(w), len(w) + 1)]
    once = {k for k in fmt.matrix_tensors if sizes[0][k].shape == sizes[1][k].shape}
    return params.keys() - once
