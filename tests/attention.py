# SPDX-License-Identifier: Apache-2.0
"""Inputs of attention: recorded from the bundled models, and random ones with outliers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Recorder(TorchFunctionMode):
    """Keeps q, k, v and the mask of every call of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            keys = ("query", "key", "value", "attn_mask")
            self.calls.append(tuple(given.get(key) for key in keys))
        return func(*args, **kwargs)


def random_qkv(
    batch: int, heads: int, tokens: int, keys: int, width: int, *, outliers: bool = False, seed=0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (B, H, N, D), views of (B, N, H, D) as diffusers has them.

    With outliers, K and V have a channel that is ten times as large, and each channel a mean of
    its own (SageAttention, figure 4).
    """
    g = torch.Generator().manual_seed(seed)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(batch, n, heads, width, generator=g).transpose(1, 2)

    q, k, v = normal(tokens), normal(keys), normal(keys)
    if outliers:
        k, v = k + 8 * normal(1), v + 2 * normal(1)
        k[..., 3] *= 10
        v[..., 5] *= 10
    return q, k, v


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative squared error."""
    return float((got.double() - want.double()).square().sum() / want.double().square().sum())
