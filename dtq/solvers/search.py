# SPDX-License-Identifier: Apache-2.0
"""Clip search: a narrower range rounds the many better and the few worse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtq.formats import Format, Params
from dtq.formats.base import in_groups

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def search(
    w: Tensor, fmt: Format, gram: Tensor | None = None, *, clips: Sequence[float] = CLIPS
) -> tuple[Tensor, Params]:
    """Choose the clip of every group that has the least squared error, then round to nearest.

    Args:
        w: float (N, K).
        fmt: the format; one that ignores ``clip`` gets its plain fit.
        gram: second moment of the input (K, K); its diagonal weighs the columns. None: all alike.
        clips: shares of the range to try.

    Returns:
        The snapped weight (N, K) and its parameters.
    """
    importance = None if gram is None else gram.diagonal()
    params = fit_clipped(w, fmt, importance, clips=clips)
    return fmt.snap(w, params), params


def fit_clipped(
    w: Tensor,
    fmt: Format,
    importance: Tensor | None = None,
    *,
    clips: Sequence[float] = CLIPS,
    outer: Params | None = None,
) -> Params:
    """Parameters with the best clip for every row and group of ``w``, whole groups of columns."""
    weight = torch.ones(w.shape[1]).to(w) if importance is None else importance.to(w)
    errors = []
    for clip in clips:
        params = fmt.fit(w, clip=clip, outer=outer)
        error = (fmt.snap(w, params) - w).square() * weight
        errors.append(in_groups(error, fmt.group).sum(-1))
    best = torch.stack(errors).argmin(0)  # (N, groups); the widest range wins ties
    chosen = torch.tensor(list(clips)).to(w)[best]
    return fmt.fit(w, clip=chosen, outer=outer)
