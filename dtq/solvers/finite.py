# SPDX-License-Identifier: Apache-2.0
"""What no solver can repair: numbers that are not numbers."""

from __future__ import annotations

from torch import Tensor

from dtq.errors import InputError

_WEIGHT = "Load an intact copy, or in a dtype that holds it (float16 ends at 65504)"
_SEEN = "what calibration saw of the input"
_MOMENT = "Calibrate again, in bfloat16 or float32 (--dtype): float16 may overflow"


def check(w: Tensor, *moments: Tensor | None, layer: str = "") -> None:
    """Refuse a weight (N, K), or moments of its input, with entries that are NaN or infinite.

    Args:
        w: the weight.
        moments: what calibration saw of the input, any shape.
        layer: name that the message starts with.

    Raises:
        InputError: says what is broken, how much of it, and what to do.
    """
    named = [("the weight", w, _WEIGHT), *((_SEEN, m, _MOMENT) for m in moments)]
    for what, tensor, advice in named:
        bad = 0 if tensor is None else int((~tensor.isfinite()).sum())
        if bad:
            where = f"{layer}: " if layer else ""
            raise InputError(f"{where}{what} has {bad} entries that are NaN or infinite. {advice}.")
