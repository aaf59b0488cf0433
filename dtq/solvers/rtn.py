# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: the baseline of every solver."""

from __future__ import annotations

from torch import Tensor

from dtq.formats import Format, QParams, fake_quantize_weight
from dtq.solvers.finite import check


def rtn(w: Tensor, fmt: Format, hessian: Tensor | None = None) -> tuple[Tensor, QParams]:
    """Keep the full range, round each weight to its nearest value.

    Args:
        w: float (N, K).
        fmt: any format.
        hessian: not used.

    Returns:
        The fake-quantized weight, float32 (N, K), and its parameters.

    Raises:
        InputError: a weight is not finite.
    """
    check(w)
    params = fmt.compute_qparams(w)
    return fake_quantize_weight(fmt, w, params), params
