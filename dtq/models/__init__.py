# SPDX-License-Identifier: Apache-2.0
"""Diffusion transformers and text encoders: ``FAMILIES``, and a scan of any model."""

from __future__ import annotations

from torch import nn

from dtq.models.base import ROLES, Family, InputGroup, Linear, Scan, Table, sibling_key
from dtq.models.families import FAMILIES
from dtq.models.scan import blocks_of, scan, scan_names
from dtq.models.text_encoders import family_of, is_of_transformers, is_text_encoder


def find_family(model: nn.Module) -> Family | None:
    """The family of a model: by the name of its class, or that of text encoders; None without."""
    name = type(model).__name__
    by_name = next((family for family in FAMILIES if name in family.classes), None)
    return family_of(model) if by_name is None and is_text_encoder(model) else by_name


__all__ = [
    "FAMILIES",
    "ROLES",
    "Family",
    "InputGroup",
    "Linear",
    "Scan",
    "Table",
    "blocks_of",
    "find_family",
    "is_of_transformers",
    "is_text_encoder",
    "scan",
    "scan_names",
    "sibling_key",
]
