# SPDX-License-Identifier: Apache-2.0
"""Cholesky factors of a Hessian and of its inverse."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dtq.errors import InputError

log = logging.getLogger("dtq")

_WIDE = 4096
"""Columns beyond which a factor is made in float32: a quarter of the time, half of the memory, and
the same error of the weight to a per cent, also where scales of inputs differ a thousandfold."""


def factor_cost(columns: int) -> tuple[int, float]:
    """What a factor takes: bytes at its peak, beside the moment; operations of float32 products."""
    wide = columns > _WIDE
    return 3 * (4 if wide else 8) * columns**2, (1.0 if wide else 2.0) * columns**3


def _inverse_factor(h: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped ``h`` (K, K), in the dtype of ``h``.

    With the order of rows and columns turned round (P), P h P = C C^T gives U = P C^-1 P: one
    factorization and the inverse of a triangle, where a dense inverse is never made.
    """
    dtypes = (torch.float32, torch.float64) if len(h) > _WIDE else (torch.float64,)
    for attempt in range(6):
        share = damp * 10**attempt
        for dtype in dtypes:
            lower = _factor(h, share, dtype)
            if lower is None:
                continue
            if attempt:
                log.info("gptq: damping raised to %g of the mean diagonal", share)
            _invert(lower)
            return lower.flip(0, 1).to(h)
    raise InputError(
        "gptq: the second moment of the input is not positive definite even when damped by "
        f"{share:g} of its mean diagonal. Calibrate again, or use search for this layer."
    )


def _factor(h: Tensor, share: float, dtype: torch.dtype) -> Tensor | None:
    """Lower Cholesky factor of ``h`` turned round and damped; None if it has none."""
    # the largest matrices of a run: two at a time
    damped = h.to(dtype).flip(0, 1)
    diagonal = damped.diagonal()
    dead = diagonal <= 0  # an input that is always zero
    mean = float(diagonal.double().mean()) or 1.0
    diagonal += dead.to(dtype) * mean + share * mean
    lower, info = torch.linalg.cholesky_ex(damped)
    return lower if int(info) == 0 else None


def _invert(lower: Tensor) -> None:
    """Put the inverse of a lower triangle (K, K) in its place, half by half."""
    size = len(lower)
    if size <= 256:
        one = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, one, upper=False))
        return
    half = size // 2
    first, second = lower[:half, :half], lower[half:, half:]
    _invert(first)
    _invert(second)
    between = lower[half:, :half]
    between.copy_(second @ (between @ first).neg_())
