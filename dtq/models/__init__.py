# SPDX-License-Identifier: Apache-2.0
"""Diffusion transformers: ``FAMILIES`` that dtq has a description of, and a scan for any model."""

from __future__ import annotations

from torch import nn

from dtq.models.base import ROLES, Family, InputGroup, Linear, Scan, sibling_key
from dtq.models.families import FAMILIES
from dtq.models.scan import blocks_of, scan, scan_names


def find_family(model: nn.Module) -> Family | None:
    """The family of a model by the name of its class; None if there is none."""
    name = type(model).__name__
    return next((family for family in FAMILIES if name in family.classes), None)


__all__ = [
    "FAMILIES",
    "ROLES",
    "Family",
    "InputGroup",
    "Linear",
    "Scan",
    "blocks_of",
    "find_family",
    "scan",
    "scan_names",
    "sibling_key",
]
