# SPDX-License-Identifier: Apache-2.0
"""Weight solvers: ``SOLVERS`` lists the ways to round a weight to a format.

A solver is a function ``(w, fmt, hessian, **knobs) -> (w_q, qparams)``: the fake-quantized weight
(N, K) in float32, and the parameters that pack it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dtq.formats import QParams
from dtq.solvers.clip_search import search
from dtq.solvers.gptq import gptq
from dtq.solvers.rtn import rtn
from dtq.solvers.yaqa import yaqa


@dataclass(frozen=True)
class Solver:
    """A row of the table.

    Attributes:
        call: the function.
        needs: names of the statistics that calibration must collect for it.
        shares: whether it takes ``factors``, a cache for the linears that read one input. One that
            needs ``gradients`` takes these, too, after the cache.
    """

    call: Callable[..., tuple[Tensor, QParams]]
    needs: frozenset[str] = frozenset()
    shares: bool = False


SOLVERS: dict[str, Solver] = {
    "rtn": Solver(rtn),
    "search": Solver(search),
    "gptq": Solver(gptq, frozenset({"hessian"}), shares=True),
    "yaqa": Solver(yaqa, frozenset({"hessian", "gradients"}), shares=True),
}

__all__ = ["SOLVERS", "Solver"]
