# SPDX-License-Identifier: Apache-2.0
"""Mixed precision under a budget: measure the sensitivity to each option, choose the best set.

After ViDiT-Q's metric-decoupled mixed precision (2406.02540, sec. 3.4). Layers are grouped by the
aspect of quality that they control, the layers of a group are ranked by the metric of that group,
and the plain error of the output divides the budget among the groups. The paper evaluates generated
images with CLIPScore, DOVER and an optical-flow score, and distributes the bits by hand. Ours, not
the paper's: proxies that read only the transformer's output, a solver, bytes instead of bits, and
one choice for all timesteps, because a second copy of a weight would cost what the first one saves.
"""

from dtq.allocate.allocation import parse_budget, parse_size

__all__ = ["parse_budget", "parse_size"]
