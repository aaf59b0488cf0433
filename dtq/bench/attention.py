# SPDX-License-Identifier: Apache-2.0
"""int8 attention compared with that of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtq.bench.compare import BenchRow, Candidate, compare

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


def attention(quick: bool, rounds: int, case: str) -> Iterator[list[BenchRow]]:
    """int8 attention and that of torch, at the shapes of some models.

    Args:
        quick: only shapes of up to 256 tokens.
        rounds: of each comparison, at least 2.
        case: only shapes whose names contain this text.
    """
    for shape in SHAPES:
        if case in shape.name and (not quick or shape.queries <= 256):
            yield compare_attention(shape, rounds)


@torch.no_grad()
def compare_attention(shape: Shape, rounds: int) -> list[BenchRow]:
    """Time int8 and float attention at one shape, on normal inputs of variance one.

    Args:
        shape: of the layer.
        rounds: interleaved, at least 2.

    Returns:
        Rows with ratios to ``REFERENCE``. Errors are those against attention in float64 of the same
        float32 inputs, so rounding these to bfloat16 counts.
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
    candidates = [Candidate(name, run, None) for name, run in runs.items()]
    return compare(
        shape.name, shape.queries, candidates, rounds, relative_to=(REFERENCE,), reference=exact
    )
