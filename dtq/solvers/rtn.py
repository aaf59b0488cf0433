# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: the baseline of every solver."""

from __future__ import annotations

from torch import Tensor

from dtq.formats import Format, QParams, fake_quantize_weight
from dtq.solvers.finite import check


def rtn(w: Tensor, fmt: Format, hessian: Tensor | None = None) -> tuple[Tensor, QParams]:
    """Fit to the full range, round each weight to its nearest value."""
    check(w)
    params = fmt.compute_qparams(w)
    return fake_quantize_weight(fmt, w, params), params
