# SPDX-License-Identifier: Apache-2.0
"""Stage: choose the modules whose attention is computed in int8.

The error of a whole step, on recorded inputs of the float model, may be ``LIMIT`` times that with
float attention. Where it is more with int8 attention in every module, the modules are ordered by
their own contribution, and as many stay int8 as the limit allows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dtq.io.memory import paged_weights
from dtq.linalg.relative_error import relative_error
from dtq.nn.attention import attention_modules, int8_attention_everywhere, use_int8_attention
from dtq.pipelines.recorded_calls import RecordedCall, replay, subsample
from dtq.stages.run import Run

log = logging.getLogger("dtq")

LIMIT = 1.05
"""Largest error of a step with int8 attention, as a multiple of that with float attention."""
INPUTS = 8
"""Recorded inputs that the error is measured on ..."""
SINGLE_INPUTS = 2
"""... and those that the contribution of one module is measured on."""


def attention(run: Run) -> None:
    """Let modules compute their attention in int8 while the step's error stays in the limit."""
    if run.recipe.attention != "int8":
        return
    calls = subsample(run.recorded, INPUTS)
    with paged_weights(run.model), int8_attention_everywhere():
        modules = attention_modules(run.model, lambda: replay(run.model, calls[0]))
        in_float = _error(run, calls, ())
        chosen, error = _chosen(run, calls, modules, LIMIT * in_float)
    use_int8_attention(run.model, chosen)
    if chosen:
        run.config.extra.setdefault("runtime", {})["int8_attention"] = chosen
    run.report.attention = {
        "int8": chosen,
        "float": [name for name in modules if name not in chosen],
        "error_float": in_float,
        "error": error,
        "limit": LIMIT,
    }
    log.info(
        "int8 attention in %d of %d modules: error of a step %.3g, %.3g with float attention",
        *(len(chosen), len(modules), error, in_float),
    )


def _chosen(
    run: Run, calls: Sequence[RecordedCall], modules: list[str], limit: float
) -> tuple[list[str], float]:
    """The modules whose attention is int8, in model order, and the error of a step with them."""
    error = _error(run, calls, modules)
    if error <= limit:
        return modules, error
    few = calls[:: -(-len(calls) // SINGLE_INPUTS)]
    with run.progress_bar("attention", total=len(modules), unit="module") as bar:
        alone = {}
        for name in modules:
            alone[name] = _error(run, few, (name,))
            bar.update()
    order = sorted(modules, key=alone.__getitem__)
    low, high, best = 0, len(order), _error(run, calls, ())
    while high - low > 1:  # `low` modules are within the limit, `high` are not
        middle = (low + high) // 2
        error = _error(run, calls, order[:middle])
        if error <= limit:
            low, best = middle, error
        else:
            high = middle
    return [name for name in modules if name in order[:low]], best


def _error(run: Run, calls: Sequence[RecordedCall], names: Sequence[str]) -> float:
    """Mean relative squared error of the output, with int8 attention in some modules."""
    use_int8_attention(run.model, names)
    errors = [relative_error(replay(run.model, call), call.output) for call in calls]
    return sum(errors) / len(errors)
