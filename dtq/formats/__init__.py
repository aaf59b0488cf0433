# SPDX-License-Identifier: Apache-2.0
"""``FORMATS``: every way dtq keeps a matrix. Reading the table is reading the feature list."""

from __future__ import annotations

from dtq.formats.base import Format, Params, Parts, Spec, bits_per_weight
from dtq.formats.integer import Int, TwoLevelInt

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Int("int8-row", 8),
        Int("int8-g64", 8, group=64),
        Int("int4-row", 4),
        Int("int4-g32", 4, group=32),
        Int("int4-g64", 4, group=64),
        Int("int4-g128", 4, group=128),
        Int("int4-asym-row", 4, asymmetric=True),
        Int("int4-asym-g32", 4, group=32, asymmetric=True),
        Int("int4-asym-g64", 4, group=64, asymmetric=True),
        Int("int4-asym-g128", 4, group=128, asymmetric=True),
        TwoLevelInt("int4-2l-g32", group=32),
        TwoLevelInt("int4-2l-g64", group=64),
        TwoLevelInt("int4-2l-g128", group=128),
    )
}

__all__ = ["FORMATS", "Format", "Params", "Parts", "Spec", "bits_per_weight"]
