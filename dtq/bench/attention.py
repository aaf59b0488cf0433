# SPDX-License-Identifier: Apache-2.0
"""int8 attention compared with that of torch: time, and error against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtq.bench.compare import Candidate, compare

REFERENCE = "int8"
"""The candidate that times are divided by."""


@dataclass(frozen=True)
class Shape:
    """Attention of one layer of a model.

    Attributes:
        name: of the row.
        batch: images, with both branches of guidance.
        heads: of the layer.
        queries: tokens that attend.
        keys: tokens that are attended to.
        channels: of a head.
    """

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    channels: int


SHAPES = (
    Shape("DiT-XL/2, 256 tokens", 2, 16, 256, 256, 72),
    Shape("DiT-XL/2, 1024 tokens", 2, 16, 1024, 1024, 72),
    Shape("PixArt, 256 tokens to 120 of text", 2, 16, 256, 120, 72),
    Shape("FLUX.1, 1024 + 128 tokens", 1, 24, 1152, 1152, 128),
    Shape("demo, 64 tokens", 2, 4, 64, 64, 64),
)


@dataclass
class AttentionRow:
    """One candidate at one shape.

    Attributes:
        case: name of the shape.
        name: of the candidate.
        seconds: median time of a call.
        ratio: quartiles of its time over that of ``REFERENCE``; None for that one itself.
        error: relative squared error of its output against attention in float64 on the same
            float32 inputs; rounding them to bfloat16 counts.
    """

    case: str
    name: str
    seconds: float
    ratio: tuple[float, float, float] | None
    error: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def attention(quick: bool, rounds: int) -> Iterator[list[AttentionRow]]:
    """Rows of each shape as soon as they are measured.

    Args:
        quick: only shapes of up to 256 tokens.
        rounds: of each comparison, at least 2.
    """
    for shape in SHAPES:
        if not quick or shape.queries <= 256:
            yield measured(shape, rounds)


@torch.no_grad()
def measured(shape: Shape, rounds: int) -> list[AttentionRow]:
    """Time int8 and float attention at one shape, on normal inputs of variance one.

    Args:
        shape: of the layer.
        rounds: interleaved, at least 2.
    """
    g = torch.Generator().manual_seed(0)

    def normal(tokens: int) -> Tensor:
        size = (shape.batch, tokens, shape.heads, shape.channels)
        return torch.randn(size, generator=g).transpose(1, 2)

    q, k, v = (normal(n) for n in (shape.queries, shape.keys, shape.keys))
    q16, k16, v16 = (x.bfloat16() for x in (q, k, v))
    scale = shape.channels**-0.5
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    int8: Callable[..., Tensor] = torch.ops.dtq.int8_attention
    runs: dict[str, Callable[[], Tensor]] = {
        REFERENCE: lambda: int8(q16, k16, v16, None, scale),
        "int8 of fp32": lambda: int8(q, k, v, None, scale),
        "bf16": lambda: F.scaled_dot_product_attention(q16, k16, v16),
        "fp32": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    candidates = [Candidate(name, run, 0) for name, run in runs.items()]
    rows = compare(shape.name, shape.queries, candidates, rounds, relative_to=(REFERENCE,))
    return [
        AttentionRow(
            shape.name, r.name, r.seconds, r.ratio.get(REFERENCE), _error(runs[r.name](), exact)
        )
        for r in rows
    ]


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).square().sum() / want.square().sum())
