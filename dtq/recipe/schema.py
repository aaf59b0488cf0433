# SPDX-License-Identifier: Apache-2.0
"""The parts of a recipe, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from dtq.io.schema import MethodSpec


@dataclass(frozen=True)
class Promote:
    """Sensitivity guard: layers that come out badly are promoted, within a budget.

    A layer is promoted to ``to`` when its relative output error exceeds ``factor`` times the
    median of the model, or ``above``, worst first, while attention and feed-forward together stay
    within ``budget`` bits per weight.
    """

    to: str = ""
    median_factor: float = 5.0
    max_error: float = 0.02
    budget: float = 4.6


@dataclass(frozen=True)
class Allocate:
    """Mixed precision: which layers get which of several formats, within a budget.

    Attributes:
        budget: over attention and feed-forward: bits per weight (``"4.8"``) or bytes (``"12MB"``);
            empty switches it off.
        options: weight formats to choose from, for every site.
        decoupled: rank the layers of a group by the group's own metric and split the budget over
            groups by output error (ViDiT-Q-MP); otherwise output error alone.
        calls: recorded calls of the float model that candidates are measured on.
    """

    budget: str | float = ""
    formats: tuple[str, ...] = ("int4-2l-g64", "int8-row")
    per_group_metric: bool = True
    num_inputs: int = 8


@dataclass(frozen=True)
class StepPolicySearch:
    """Step policy: activation precision by part of the trajectory, on the same weights.

    Attributes:
        modes: precisions to choose from, keys of ``acts.MODES``, cheapest first; empty: none.
        cost: share of steps that may run in a dearer mode than the first.
        ranges: parts that the trajectory is cut into.
        calls: recorded calls of the float model that modes are measured on, per range.
    """

    precisions: tuple[str, ...] = ()
    budget: float = 0.25
    num_bins: int = 8
    num_inputs: int = 2


@dataclass(frozen=True)
class Rule:
    """Exceptions: what layers matching a role or a glob on the name do instead."""

    match: str
    weights: str | None = None
    activations: str | None = None
    transform: MethodSpec | None = None
    solver: MethodSpec | None = None
    lowrank: MethodSpec | None = None
