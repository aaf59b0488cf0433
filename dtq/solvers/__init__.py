# SPDX-License-Identifier: Apache-2.0
"""``SOLVERS``: how a weight becomes representable, ``(w, fmt, gram, **knobs) -> (w, params)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dtq.formats import Params
from dtq.solvers.gptq import gptq
from dtq.solvers.rtn import rtn
from dtq.solvers.search import search


@dataclass(frozen=True)
class Solver:
    """A row of the table: the function, and what calibration must collect for it."""

    call: Callable[..., tuple[Tensor, Params]]
    needs: frozenset[str] = frozenset()


SOLVERS: dict[str, Solver] = {
    "rtn": Solver(rtn),
    "search": Solver(search),
    "gptq": Solver(gptq, frozenset({"gram"})),
}

__all__ = ["SOLVERS", "Solver"]
