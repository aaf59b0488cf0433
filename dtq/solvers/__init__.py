# SPDX-License-Identifier: Apache-2.0
"""``SOLVERS``: how a weight becomes representable, ``(w, fmt, hessian, **knobs) -> (w, params)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dtq.formats import QParams
from dtq.solvers.clip_search import search
from dtq.solvers.gptq import gptq
from dtq.solvers.rtn import rtn


@dataclass(frozen=True)
class Solver:
    """A row of the table.

    Attributes:
        call: the function.
        needs: what calibration must collect for it.
        shares: whether it takes ``factors``, which linears that read one input share.
    """

    call: Callable[..., tuple[Tensor, QParams]]
    needs: frozenset[str] = frozenset()
    shares: bool = False


SOLVERS: dict[str, Solver] = {
    "rtn": Solver(rtn),
    "search": Solver(search),
    "gptq": Solver(gptq, frozenset({"hessian"}), shares=True),
}

__all__ = ["SOLVERS", "Solver"]
