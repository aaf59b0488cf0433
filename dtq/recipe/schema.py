# SPDX-License-Identifier: Apache-2.0
"""The parts of a recipe, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from dtq.io.schema import MethodSpec


@dataclass(frozen=True)
class Promote:
    """Promotion of sensitive layers within a budget.

    A layer is promoted, worst first, when its relative output error is above the limit: the smaller
    of ``max_error`` and ``median_factor`` times the median of the model.

    Attributes:
        to: weight format; empty switches promotion off.
        median_factor: limit as a multiple of the median error.
        max_error: limit of the relative squared output error.
        budget: bits per weight that attention and feed-forward together may take.
        adapt: where the layers of a model take more than the budget as they are, keep what the
            budget leaves for promotion where ``weights`` fits every layer.
    """

    to: str = ""
    median_factor: float = 5.0
    max_error: float = 0.02
    budget: float = 4.6
    adapt: bool = False


@dataclass(frozen=True)
class Allocate:
    """Mixed precision: one of several weight formats for each input group, within a budget.

    Attributes:
        budget: of attention and feed-forward: bits per weight (``"4.8"``) or bytes (``"12MB"``);
            empty switches mixed precision off.
        formats: weight formats to choose from.
        per_group_metric: rank the layers of a metric group by the group's own metric and divide
            the budget among groups by output error (ViDiT-Q-MP); otherwise output error alone.
        num_inputs: recorded inputs that candidates are measured on.
        adapt: raise a budget that is below what the formats need on a model, with a warning: to
            what they need, and what the budget leaves where the narrowest one fits every layer.
    """

    budget: str | float = ""
    formats: tuple[str, ...] = ("int4-2l-g64", "int8-row")
    per_group_metric: bool = True
    num_inputs: int = 8
    adapt: bool = False


@dataclass(frozen=True)
class StepPolicySearch:
    """Search of a step policy: activation precision by part of the trajectory.

    Attributes:
        precisions: keys of ``PRECISIONS`` to choose from, cheapest first; empty: no policy.
        budget: share of the steps that may run in a more expensive precision than the first.
        num_bins: timestep bins of the trajectory.
        num_inputs: recorded inputs that precisions are measured on, per bin.
    """

    precisions: tuple[str, ...] = ()
    budget: float = 0.25
    num_bins: int = 8
    num_inputs: int = 2


@dataclass(frozen=True)
class Rule:
    """An exception for the layers that match a role, or a glob on the name; None: no exception."""

    match: str
    weights: str | None = None
    activations: str | None = None
    transform: MethodSpec | None = None
    solver: MethodSpec | None = None
    lowrank: MethodSpec | None = None
