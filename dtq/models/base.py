# SPDX-License-Identifier: Apache-2.0
"""Linears, their roles and input groups, and the description of a model family."""

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
    "ffn.up": "feed-forward, expansion to the hidden width",
    "ffn.down": "feed-forward, projection back to the model width",
    "proj": "projection of a U-Net: shortcuts, into and out of its transformers",
    "adaln": "modulation: one row per image, whose result scales every token",
    "embed": "embedders of patches, time, labels and text",
    "head": "final norm and projection",
    "conv": "a convolution of a block that is no linear; `convolutions` of a recipe is its format",
    "vocab": "a table of token embeddings; `embeddings` of a recipe is its format",
    "other": "a linear in a block that no rule matches",
}
"""Roles of linears, the names that recipes select layers by."""


@dataclass(frozen=True)
class Linear:
    """A linear of the model: dotted name, role, (N, K), whether it has a bias."""

    name: str
    role: str
    shape: tuple[int, int]
    bias: bool


@dataclass(frozen=True)
class Table(Linear):
    """A table of token embeddings (N, D), and the names of the modules with the same weight."""

    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputGroup:
    """Linears that read the same tensor, and therefore share its statistics and its transform."""

    name: str
    linears: tuple[Linear, ...]

    @property
    def columns(self) -> int:
        """K, the number of input channels."""
        return self.linears[0].shape[1]


@dataclass(frozen=True)
class Scan:
    """The linears of a model and what is known about them.

    Attributes:
        family: name of the family, or ``generic``.
        input_groups: in call order.
        uncalled: linears that the traced forward did not call; they are never quantized.
        traced: False if no forward could be run, and roles come from names alone.
        rows: input rows (M) of each linear in the traced forward.
        unsupported: weights in blocks that are no linears, and why.
        convolutions: of those the convolutions whose weight can be stored in 8 bits.
        tables: tables of token embeddings that can be stored in fewer bits.
    """

    family: str
    input_groups: tuple[InputGroup, ...]
    uncalled: tuple[str, ...] = ()
    traced: bool = True
    rows: dict[str, int] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    convolutions: tuple[Linear, ...] = ()
    tables: tuple[Table, ...] = ()

    def linears(self) -> list[Linear]:
        """The linears of all input groups, in call order."""
        return [linear for group in self.input_groups for linear in group.linears]

    def group_of(self, layer: str) -> str:
        """Name of the input group that a linear reads."""
        return next(g.name for g in self.input_groups for x in g.linears if x.name == layer)


def sibling_key(name: str) -> str:
    """The name without its index in the innermost list; equal for the experts of one block."""
    return re.sub(r"(.*)\.\d+\.", r"\1.*.", name)


Inputs = Callable[[Any, int, torch.Tensor, torch.Generator], dict[str, Any]]
"""``(config, batch, timestep (batch,), generator) -> keyword arguments of one forward``."""


@dataclass(frozen=True)
class Family:
    """What a scan of a model cannot find out by itself.

    Attributes:
        name: of the family.
        classes: names of its diffusers classes.
        inputs: makes the arguments of one forward, with random latents and conditions.
        roles: (regular expression on the dotted name, role), tried before the general rules.
        largest_timestep: upper end of the timestep argument.
    """

    name: str
    classes: tuple[str, ...]
    inputs: Inputs
    roles: tuple[tuple[str, str], ...] = ()
    largest_timestep: float = 1000.0
