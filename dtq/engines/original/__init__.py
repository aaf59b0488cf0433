# SPDX-License-Identifier: Apache-2.0
"""Original names: a model's tensors as its authors name, fuse and order them.

diffusers has its own names, and takes apart what other engines keep as one tensor, such as q, k and
v. ``names/`` has a table for each family. The order of rows is not in the tables:
:mod:`dtq.engines.original.mapping` derives it from diffusers' own converter.
"""

from __future__ import annotations

from dtq.engines.original.contents import (
    config_of,
    fusion_reasons,
    joined_layers,
    names_of_file,
    to_diffusers,
    to_original,
    with_names_of_diffusers,
)
from dtq.engines.original.mapping import Entry, KeyMap, Part, key_map
from dtq.engines.original.name_table import NameTable, table_for, tables

__all__ = [
    "Entry",
    "KeyMap",
    "NameTable",
    "Part",
    "config_of",
    "fusion_reasons",
    "joined_layers",
    "key_map",
    "names_of_file",
    "table_for",
    "tables",
    "to_diffusers",
    "to_original",
    "with_names_of_diffusers",
]
