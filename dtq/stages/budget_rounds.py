# SPDX-License-Identifier: Apache-2.0
"""A budget also holds for what the sanity check promotes: the other layers pay for it.

The check runs when the budget is spent. If the layers that it promotes take the files beyond the
budget, the models become float again, these layers are fixed as they were promoted, and the formats
of the others are chosen anew. Then the check runs again, because narrower formats may fail.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

from dtq.errors import InputError
from dtq.nn.swap import restore, temporarily_replaced
from dtq.stages.file_tensors import model_bytes
from dtq.stages.pipeline_budget import SharedBudget
from dtq.stages.run import Run

log = logging.getLogger("dtq")

ROUNDS = 4
"""How often the budget is spent at most."""


class BudgetRounds:
    """The rounds of a budget that is measured; in the main process.

    Args:
        shared: measured.
    """

    def __init__(self, shared: SharedBudget) -> None:
        self.shared = shared
        self._dtypes = {run.loaded.component: run.loaded.dtype for run in shared.runs}
        self._before = {
            name: (run.plan, {**run.results}, copy.deepcopy(run.config))
            for name, run in shared.shared.items()
        }
        self._promoted: dict[str, list[Any]] = {name: [] for name in shared.shared}

    def __iter__(self) -> Iterator[list[Run]]:
        """The runs to apply the stages to, once per round, until the files keep to the budget.

        Raises:
            InputError: no choice of formats keeps to it; says what was promoted. The models whose
                formats the budget chooses are float again.
        """
        shared, runs = self.shared, list(self.shared.runs)
        for left in reversed(range(ROUNDS)):
            self._spend()
            yield [run for run in runs if run.plan.quantized()]
            if self._fits():
                break
            self._make_float()
            if not left:
                raise InputError(
                    f"{self._name}: in {ROUNDS} rounds the sanity check promoted "
                    f"{self._layers()}, and all weight files still take "
                    f"{shared.budget.outcome['bytes']} bytes of a budget of "
                    f"{shared.budget.bytes}. {self._advice()}"
                )
            log.warning(
                "the sanity check promoted %s: all weight files would take %d bytes of a budget of "
                "%d, so the formats of the other layers are chosen again",
                self._layers(), shared.budget.outcome["bytes"], shared.budget.bytes,
            )  # fmt: skip
            runs = list(shared.shared.values())
        for name, run in shared.shared.items():
            if earlier := self._promoted[name]:
                now = run.report.sanity_check.get("promoted", [])
                run.report.sanity_check["promoted"] = [*earlier, *now]

    @property
    def _name(self) -> str:
        return self.shared.runs[0].loaded.name

    def _advice(self) -> str:
        taken = self.shared.budget.outcome["bytes"]
        return (
            f"Raise the budget (--budget {taken}b is the size that was found), or leave the check "
            f"out (--no-sanity-check, sanity_check=False)"
        )

    def _layers(self) -> str:
        """The promoted layers of all rounds."""
        names = [entry["layer"] for every in self._promoted.values() for entry in every]
        names += [
            layer
            for run in self.shared.runs
            if run.loaded.component not in self._promoted
            for layer in run.promoted
        ]
        return ", ".join(dict.fromkeys(names))

    def _spend(self) -> None:
        try:
            self.shared.spend()
        except InputError as error:
            if not (layers := self._layers()):
                raise
            raise InputError(
                f"{error}, with {layers}, which the sanity check promoted. {self._advice()}"
            ) from error

    def _fits(self) -> bool:
        """Count the files with what was promoted; whether they keep to the budget."""
        outcome = self.shared.budget.outcome
        for run in self.shared.runs:
            name = run.loaded.component
            if run.promoted:
                with temporarily_replaced(run.model, run.floats):
                    size = model_bytes(run.model, run.plan, self._dtypes[name])
                outcome["components"][name]["bytes"] = size
            if name not in self.shared.shared:
                self.shared.counted[name] = outcome["components"][name]["bytes"]
        outcome["bytes"] = sum(part["bytes"] for part in outcome["components"].values())
        return bool(outcome["bytes"] <= self.shared.budget.bytes)

    def _make_float(self) -> None:
        """Undo the round, and fix the layers that it promoted."""
        for name, run in self.shared.shared.items():
            self._promoted[name] += run.report.sanity_check.get("promoted", [])
            for layer, old in run.floats.items():
                run.model.set_submodule(layer, old)
            restore(run.model)
            plan, results, config = self._before[name]
            for layer, result in run.promoted.items():
                if result is None:
                    self.shared.kept[name][layer] = run.plan[layer]
                if not self.shared.fix(run, layer, result):
                    plan = plan.with_layers({layer: run.plan[layer]})
                    results = {k: r for k, r in results.items() if k != layer}
                    results |= {} if result is None else {layer: result}
            self._before[name] = plan, results, config
            run.plan, run.results, run.config = plan, {**results}, copy.deepcopy(config)
            run.floats.clear()
            run.promoted.clear()
            run.report.layers.clear()
