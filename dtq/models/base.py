# SPDX-License-Identifier: Apache-2.0
"""Sites, roles, and what a family file may say about a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

ROLES: dict[str, str] = {
    "attn.q": "query projection of self or joint attention",
    "attn.k": "key projection",
    "attn.v": "value projection",
    "attn.qkv": "fused projection of attention inputs",
    "attn.out": "output projection of attention",
    "xattn.q": "query projection of cross-attention",
    "xattn.k": "key projection of cross-attention, input from the condition",
    "xattn.v": "value projection of cross-attention, input from the condition",
    "xattn.kv": "fused keys and values of cross-attention, input from the condition",
    "xattn.out": "output projection of cross-attention",
    "ffn.up": "feed-forward, to the wide side",
    "ffn.down": "feed-forward, back to the narrow side",
    "adaln": "modulation: one row per picture, its result multiplies every token",
    "embed": "embedders of patches, time, labels and text",
    "head": "final norm and projection",
    "other": "a linear in a block that no rule knows",
}
"""The vocabulary of recipes."""


@dataclass(frozen=True)
class Linear:
    """A linear of the model: dotted name, role, (N, K), whether it has a bias."""

    name: str
    role: str
    shape: tuple[int, int]
    bias: bool


@dataclass(frozen=True)
class InputGroup:
    """Linears that read the same tensor, and so share its statistics and its transform."""

    name: str
    linears: tuple[Linear, ...]

    @property
    def columns(self) -> int:
        return self.linears[0].shape[1]


@dataclass(frozen=True)
class Scan:
    """What a model consists of.

    Attributes:
        family: name of the family, or ``generic``.
        sites: in call order.
        never: linears that the traced forward did not call; they are never quantized.
        traced: False when no forward could be run and names alone decided.
        rows: input rows of each linear in the traced forward.
        unmatched: weights in blocks that cannot be quantized, and what they are.
    """

    family: str
    input_groups: tuple[InputGroup, ...]
    uncalled: tuple[str, ...] = ()
    traced: bool = True
    rows: dict[str, int] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)

    def linears(self) -> list[Linear]:
        return [linear for site in self.input_groups for linear in site.linears]


def sibling_key(name: str) -> str:
    """The name without the place in the innermost list, equal for the experts of one block."""
    return re.sub(r"(.*)\.\d+\.", r"\1.*.", name)


Inputs = Callable[[Any, int, torch.Tensor, torch.Generator], dict[str, Any]]
"""``(config, batch, timestep (batch,), generator) -> keyword arguments of one forward``."""


@dataclass(frozen=True)
class Family:
    """What the scan cannot see by itself. Everything here is data.

    Attributes:
        name: of the family.
        classes: names of its diffusers classes.
        roles: (regular expression on the dotted name, role), tried before the general rules.
        inputs: builds the arguments of one forward with random latents and conditions.
        largest_timestep: upper end of the timestep argument.
    """

    name: str
    classes: tuple[str, ...]
    inputs: Inputs
    roles: tuple[tuple[str, str], ...] = ()
    largest_timestep: float = 1000.0
