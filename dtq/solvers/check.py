# SPDX-License-Identifier: Apache-2.0
"""What every solver refuses: numbers that are not numbers."""

from __future__ import annotations

from torch import Tensor

from dtq.errors import InputError


def check(w: Tensor, gram: Tensor | None = None) -> None:
    """Refuse a weight (N, K) or second moment (K, K) with entries that are NaN or infinite."""
    named = (("the weight", w, "The model file is damaged"), (_MOMENT, gram, "Calibrate again"))
    for what, tensor, advice in named:
        bad = 0 if tensor is None else int((~tensor.isfinite()).sum())
        if bad:
            raise InputError(f"{what} has {bad} entries that are NaN or infinite. {advice}.")


_MOMENT = "the second moment of the input"
