# SPDX-License-Identifier: Apache-2.0
"""Mixed precision under a budget: measure what each option does to the output, choose the best.

After ViDiT-Q's metric-decoupled mixed precision (2406.02540, sec. 3.4): layers fall into groups by
the quality aspect that they control, a group's layers are ranked by that group's metric, and the
plain error of the output divides the budget among the groups. The paper judges generated pictures
with CLIPScore, DOVER and an optical-flow score and spends the bits by hand. Ours, not the paper's:
proxies that read the transformer's output alone, a solver instead of the hand, bytes instead of
bits, and one choice for all timesteps, because a second copy of a weight would cost what the first
one saves.
"""

from dtq.allocate.allocation import Allocation, AllocationRow, allocate, parse_budget, parse_size
from dtq.allocate.knapsack import LIMIT, Bounds, Option, knapsack
from dtq.allocate.measure import Measured, measure, sensitivities
from dtq.allocate.metrics import GROUPS, METRICS, groups_of

__all__ = [
    "GROUPS",
    "LIMIT",
    "METRICS",
    "Allocation",
    "AllocationRow",
    "Bounds",
    "Measured",
    "Option",
    "allocate",
    "groups_of",
    "knapsack",
    "measure",
    "parse_budget",
    "parse_size",
    "sensitivities",
]
