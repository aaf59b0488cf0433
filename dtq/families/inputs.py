# SPDX-License-Identifier: Apache-2.0
"""Random arguments of one forward: latents, timestep and conditions of the right shape.

Every function is an ``Inputs``: ``(config, batch, timestep (batch,), generator) -> arguments``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def class_labels(c: Any, batch: int, timestep: Tensor, rng: torch.Generator) -> dict[str, Any]:
    """DiT: a label drawn from the whole table for each picture, half of them the null label."""
    labels = torch.randint(0, c.num_embeds_ada_norm, (batch,), generator=rng)
    labels[batch // 2 :] = c.num_embeds_ada_norm  # as guidance does
    return {
        "hidden_states": _noise(rng, batch, c.in_channels, c.sample_size, c.sample_size),
        "timestep": timestep.long(),
        "class_labels": labels,
    }


def text(c: Any, batch: int, timestep: Tensor, rng: torch.Generator) -> dict[str, Any]:
    """PixArt and other cross-attention models on square latents."""
    width = c.get("caption_channels") or c.cross_attention_dim
    return {
        "hidden_states": _noise(rng, batch, c.in_channels, c.sample_size, c.sample_size),
        "timestep": timestep.long(),
        "encoder_hidden_states": _noise(rng, batch, 32, width),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}
        if not c.get("use_additional_conditions")
        else {"resolution": torch.full((batch, 2), 1024.0), "aspect_ratio": torch.ones(batch, 1)},
    }


def joint_text(c: Any, batch: int, timestep: Tensor, rng: torch.Generator) -> dict[str, Any]:
    """SD3: text joins the attention, a pooled vector joins the time."""
    return {
        "hidden_states": _noise(rng, batch, c.in_channels, c.sample_size, c.sample_size),
        "timestep": timestep,
        "encoder_hidden_states": _noise(rng, batch, 32, c.joint_attention_dim),
        "pooled_projections": _noise(rng, batch, c.pooled_projection_dim),
    }


def packed_text(c: Any, batch: int, timestep: Tensor, rng: torch.Generator) -> dict[str, Any]:
    """Flux: packed latents with explicit positions."""
    side, words = 16, 32
    ids = torch.zeros(side * side, 3)
    ids[:, 1] = torch.arange(side).repeat_interleave(side)
    ids[:, 2] = torch.arange(side).repeat(side)
    return {
        "hidden_states": _noise(rng, batch, side * side, c.in_channels),
        "timestep": timestep,
        "encoder_hidden_states": _noise(rng, batch, words, c.joint_attention_dim),
        "pooled_projections": _noise(rng, batch, c.pooled_projection_dim),
        "img_ids": ids,
        "txt_ids": torch.zeros(words, 3),
        "guidance": torch.full((batch,), 3.5) if c.guidance_embeds else None,
    }


def video_text(c: Any, batch: int, timestep: Tensor, rng: torch.Generator) -> dict[str, Any]:
    """Wan: five latent frames, text by cross-attention."""
    return {
        "hidden_states": _noise(rng, batch, c.in_channels, 5, 16, 16),
        "timestep": timestep.long(),
        "encoder_hidden_states": _noise(rng, batch, 32, c.text_dim),
    }


def _noise(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng)
