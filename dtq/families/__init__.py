# SPDX-License-Identifier: Apache-2.0
"""``FAMILIES``: the models dtq knows by name. Others are scanned by the general rules."""

from __future__ import annotations

from torch import nn

from dtq.families.base import ROLES, TIME_ARGUMENTS, Family, Linear, Scan, Site, sibling_key
from dtq.families.scan import blocks_of, scan, scan_names
from dtq.families.table import FAMILIES


def find(model: nn.Module) -> Family | None:
    """The family of a model by the name of its class, None when it has none."""
    name = type(model).__name__
    return next((family for family in FAMILIES if name in family.classes), None)


__all__ = [
    "FAMILIES",
    "ROLES",
    "TIME_ARGUMENTS",
    "Family",
    "Linear",
    "Scan",
    "Site",
    "blocks_of",
    "find",
    "scan",
    "scan_names",
    "sibling_key",
]
