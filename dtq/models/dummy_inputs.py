# SPDX-License-Identifier: Apache-2.0
"""Random arguments of one forward: latents, timestep and conditions of the right shape.

A family names a maker for each argument, ``arguments(hidden_states=noise("in_channels", 32, 32),
timestep=time, ...)``. Sizes are numbers, keys of the configuration, or functions of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtq.models.base import Inputs

SIDE = 16
"""Tokens of a packed picture along one side."""
TOKENS = SIDE * SIDE
WORDS = 32
FRAMES = 5
"""Latent frames of a video: the first, which causal VAEs have by itself, and four."""


@dataclass(frozen=True)
class ForwardInputs:
    """The forward that arguments are made for: B pictures at one timestep each."""

    config: Any
    batch: int
    timestep: Tensor  # (B,)
    rng: torch.Generator

    def sizes(self, sizes: tuple[Size, ...]) -> tuple[int, ...] | None:
        """As numbers; None when the configuration leaves one of them out."""
        found = [
            # attributes: diffusers changes those only when it widens a layer
            getattr(self.config, s, None)
            if isinstance(s, str)
            else s(self.config)
            if callable(s)
            else s
            for s in sizes
        ]
        known = tuple(size for size in found if size is not None)
        return known if len(known) == len(found) else None


Size = int | str | Callable[[Any], int | None]
Maker = Callable[[ForwardInputs], Any]


def arguments(**makers: Maker) -> Inputs:
    """The arguments of one forward, each by its maker."""

    def made(config: Any, batch: int, timestep: Tensor, rng: torch.Generator) -> dict[str, Any]:
        call = ForwardInputs(config, batch, timestep, rng)
        return {name: maker(call) for name, maker in makers.items()}

    return made


# ------------------------------------------------------------------------- time and guidance
def time(call: ForwardInputs) -> Tensor:
    """(B,) float, as flow matching has it."""
    return call.timestep


def step(call: ForwardInputs) -> Tensor:
    """(B,) int64, a row of the noise schedule."""
    return call.timestep.long()


def time_of_each(*counts: int) -> Maker:
    """(B, *counts): every frame or token has the same time."""
    return lambda call: call.timestep.view(-1, *(1 for _ in counts)).repeat(1, *counts)


def guidance(scale: float) -> Maker:
    """(B,) the scale of distilled guidance; None for models without."""
    return when("guidance_embeds", full(scale))


def when(key: str, maker: Maker) -> Maker:
    """What ``maker`` makes if the configuration has ``key``, else None."""
    return lambda call: maker(call) if call.config.get(key) else None


# ---------------------------------------------------------------------- tensors of any shape
def noise(*sizes: Size) -> Maker:
    """Normal (B, *sizes); None when the configuration has None for one of the sizes."""

    def made(call: ForwardInputs) -> Tensor | None:
        shape = call.sizes(sizes)
        return None if shape is None else torch.randn((call.batch, *shape), generator=call.rng)

    return made


def full(value: float, *sizes: Size, dtype: torch.dtype = torch.float32) -> Maker:
    """(B, *sizes) of one value."""

    def made(call: ForwardInputs) -> Tensor | None:
        shape = call.sizes(sizes)
        return None if shape is None else torch.full((call.batch, *shape), value, dtype=dtype)

    return made


def mask(*sizes: Size) -> Maker:
    """(B, *sizes) bool: no token is padding."""
    return full(True, *sizes, dtype=torch.bool)


def draws(top: Size, *sizes: Size) -> Maker:
    """(B, *sizes) int64, uniform below ``top``: tokens of a codebook."""

    def made(call: ForwardInputs) -> Tensor:
        limit, *shape = call.sizes((top, *sizes)) or (1,)
        return torch.randint(0, limit, (call.batch, *shape), generator=call.rng)

    return made


def each(maker: Maker) -> Maker:
    """A list with one tensor (...) for each picture, of what ``maker`` makes (B, ...)."""
    return lambda call: [*maker(call)]


def listed(count: Size, maker: Maker) -> Maker:
    """A list of ``count`` results of ``maker``."""
    return lambda call: [maker(call) for _ in range((call.sizes((count,)) or (0,))[0])]


def constant(value: Any) -> Maker:
    return lambda call: value


# --------------------------------------------------------------------------------- positions
def grid(axes: int, words: int = 0, side: int = SIDE) -> Maker:
    """(words + side^2, axes) int64: rows and columns on axes 1 and 2, before them words at zero."""

    def made(call: ForwardInputs) -> Tensor:
        ids = torch.zeros(words + side * side, axes, dtype=torch.long)
        ids[words:, 1] = torch.arange(side).repeat_interleave(side)
        ids[words:, 2] = torch.arange(side).repeat(side)
        return ids

    return made


def line(*axes: int, of: int) -> Maker:
    """(WORDS, of) int64: the number of the word on the given axes, zero on others."""

    def made(call: ForwardInputs) -> Tensor:
        ids = torch.zeros(WORDS, of, dtype=torch.long)
        ids[:, axes] = torch.arange(WORDS)[:, None]
        return ids

    return made


def numbers(*counts: int) -> Maker:
    """One (count,) int64 from zero for each count; the tensor itself if there is but one."""

    def made(call: ForwardInputs) -> Any:
        found = [torch.arange(count) for count in counts]
        return found if len(found) > 1 else found[0]

    return made


def frames(first: int, count: int) -> Maker:
    """(B, count) int64: numbers of frames."""
    return batched(lambda call: torch.arange(first, first + count))


def batched(maker: Maker) -> Maker:
    """(B, ...) of what ``maker`` makes once, a tensor (...) or a tuple of tensors."""

    def made(call: ForwardInputs) -> Any:
        once = maker(call)
        if isinstance(once, tuple):
            return tuple(t.expand(call.batch, *t.shape).clone() for t in once)
        return once.expand(call.batch, *once.shape).clone()

    return made


def picture_shapes(call: ForwardInputs) -> list[list[tuple[int, int, int]]]:
    """Frames, rows and columns of the one packed picture in each entry of the batch."""
    return [[(1, SIDE, SIDE)] for _ in range(call.batch)]


def rotation(tokens: Size, width: Size) -> Maker:
    """Cosines and sines, (tokens, width) each, of positions along one axis."""

    def made(call: ForwardInputs) -> tuple[Tensor, Tensor]:
        count, size = call.sizes((tokens, width)) or (0, 0)
        rates = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(count), rates).repeat_interleave(2, 1)  # (tokens, width)
        return angles.cos(), angles.sin()

    return made


# ------------------------------------------------------------------- what only one model has
def labels(call: ForwardInputs) -> Tensor:
    """(B,) drawn from the whole table, the second half the null label, as guidance does."""
    found = torch.randint(0, call.config.num_embeds_ada_norm, (call.batch,), generator=call.rng)
    found[call.batch // 2 :] = call.config.num_embeds_ada_norm
    return found


def resolution(call: ForwardInputs) -> dict[str, Tensor | None]:
    """PixArt alpha: height and width (B, 2), aspect ratio (B, 1); none of them in sigma."""
    if not call.config.get("use_additional_conditions"):
        return {"resolution": None, "aspect_ratio": None}
    size = torch.full((call.batch, 2), 1024.0)
    return {"resolution": size, "aspect_ratio": torch.ones(call.batch, 1)}


def lumina_rotation(call: ForwardInputs) -> Tensor:
    """(384, 384, head / 2) complex: rows and columns turn the even and the odd channels."""
    side, half = 384, call.config.hidden_size // call.config.num_attention_heads // 2
    angles = torch.outer(torch.arange(side), 10000.0 ** (-torch.arange(0, half, 2) / half))
    rows, columns = angles[:, None].expand(-1, side, -1), angles.expand(side, -1, -1)
    both = torch.stack([rows, columns], -1).flatten(2)  # (384, 384, head / 2)
    return torch.polar(torch.ones_like(both), both)


def first_frame(call: ForwardInputs) -> Tensor:
    """HunyuanVideo 1.5: features (B, WORDS, K) of the first frame, zero for text to video."""
    shape = call.batch, WORDS, call.config.image_embed_dim
    scale = 0.0 if call.config.task_type == "t2v" else 1.0
    return scale * torch.randn(shape, generator=call.rng)


def cosmos_condition(call: ForwardInputs) -> Any:
    """Text (B, WORDS, K), for models with image context the pair of it and (B, tokens, K)."""
    width = (
        "crossattn_proj_in_channels" if call.config.use_crossattn_projection else "text_embed_dim"
    )
    text = noise(WORDS, width)(call)
    if not call.config.get("img_context_dim_in"):
        return text
    return text, noise("img_context_num_tokens", "img_context_dim_in")(call)


def words_then_picture(word: int, picture: int) -> Maker:
    """(B, WORDS + TOKENS) int64: which of the two a token is."""
    return batched(lambda call: torch.tensor([word] * WORDS + [picture] * TOKENS))
