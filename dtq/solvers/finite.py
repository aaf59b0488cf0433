# SPDX-License-Identifier: Apache-2.0
"""Refuse NaN and infinity before they reach a solver."""

from __future__ import annotations

from torch import Tensor

from dtq.errors import InputError

_WEIGHT = "Load an intact copy, or in a dtype that holds it (float16 ends at 65504)"
_INPUT = "what calibration saw of the input"
_MOMENT = "Calibrate again, in bfloat16 or float32 (--dtype): float16 may overflow"


def check(w: Tensor, *moments: Tensor | None, layer: str = "") -> None:
    """Refuse entries that are NaN or infinite.

    Args:
        w: the weight (N, K).
        moments: statistics of its input, any shape; None is skipped.
        layer: name that the message starts with.

    Raises:
        InputError: some are. The message has their number, and what to do.
    """
    tensors = [("the weight", w, _WEIGHT), *((_INPUT, m, _MOMENT) for m in moments)]
    for name, tensor, advice in tensors:
        bad = 0 if tensor is None else int((~tensor.isfinite()).sum())
        if bad:
            where = f"{layer}: " if layer else ""
            raise InputError(f"{where}{name} has {bad} entries that are NaN or infinite. {advice}.")
