# SPDX-License-Identifier: Apache-2.0
"""Random arguments of one forward: latents, timestep and conditions of the right shapes.

A family has one maker per argument, for example ``arguments(timestep=timestep,
hidden_states=noise("in_channels", 32, 32))``. A size is a number, a key of the configuration, or a
function of the configuration. In shapes, B is the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtq.models.base import Inputs

SIDE = 16
"""Height and width of the latents of an image, in tokens."""
TOKENS = SIDE * SIDE
"""Tokens of an image."""
WORDS = 32
"""Tokens of a caption."""
FRAMES = 5
"""Latent frames of a video: one that a causal VAE encodes separately, and four more."""


@dataclass(frozen=True)
class ForwardInputs:
    """The values that the arguments of one forward are made from.

    Attributes:
        config: configuration of the model.
        batch: B, number of images.
        timestep: float (B,).
        rng: generator of the random values.
    """

    config: Any
    batch: int
    timestep: Tensor
    rng: torch.Generator

    def size(self, size: Size) -> int | None:
        """A size as a number; None if the configuration has None for it."""
        if isinstance(size, str):
            # attributes, not keys: diffusers updates only these when it widens a layer
            return getattr(self.config, size, None)
        return size(self.config) if callable(size) else size

    def sizes(self, sizes: tuple[Size, ...]) -> tuple[int, ...] | None:
        """Sizes as numbers; None if the configuration has None for one of them."""
        known = tuple(value for value in map(self.size, sizes) if value is not None)
        return known if len(known) == len(sizes) else None


Size = int | str | Callable[[Any], int | None]
Maker = Callable[[ForwardInputs], Any]


def arguments(**makers: Maker) -> Inputs:
    """The arguments of one forward, each by its maker, in this order."""

    def make(config: Any, batch: int, timestep: Tensor, rng: torch.Generator) -> dict[str, Any]:
        forward = ForwardInputs(config, batch, timestep, rng)
        return {name: maker(forward) for name, maker in makers.items()}

    return make


# ------------------------------------------------------------------------- timestep and guidance
def timestep(forward: ForwardInputs) -> Tensor:
    """(B,) float, as in flow matching."""
    return forward.timestep


def timestep_index(forward: ForwardInputs) -> Tensor:
    """(B,) int64, an index into the noise schedule."""
    return forward.timestep.long()


def timestep_per(*counts: int) -> Maker:
    """(B, *counts): the same timestep for every frame or token."""
    return lambda forward: forward.timestep.view(-1, *(1 for _ in counts)).repeat(1, *counts)


def guidance(scale: float) -> Maker:
    """(B,) the scale of distilled guidance; None for models without it."""
    return when("guidance_embeds", full(scale))


def when(key: str, maker: Maker) -> Maker:
    """The result of ``maker`` if the configuration has a true value for ``key``, else None."""
    return lambda forward: maker(forward) if forward.config.get(key) else None


# ---------------------------------------------------------------------- tensors of any shape
def noise(*sizes: Size) -> Maker:
    """Normal (B, *sizes); None if the configuration has None for one of the sizes."""
    return _tensor(sizes, lambda shape, rng: torch.randn(shape, generator=rng))


def full(value: float, *sizes: Size, dtype: torch.dtype = torch.float32) -> Maker:
    """(B, *sizes) of one value."""
    return _tensor(sizes, lambda shape, rng: torch.full(shape, value, dtype=dtype))


def _tensor(
    sizes: tuple[Size, ...], fill: Callable[[tuple[int, ...], torch.Generator], Tensor]
) -> Maker:
    def make(forward: ForwardInputs) -> Tensor | None:
        shape = forward.sizes(sizes)
        return None if shape is None else fill((forward.batch, *shape), forward.rng)

    return make


def mask(*sizes: Size) -> Maker:
    """(B, *sizes) bool, all true: no token is padding."""
    return full(True, *sizes, dtype=torch.bool)


def random_ids(limit: Size, *sizes: Size) -> Maker:
    """(B, *sizes) int64, uniform below ``limit``: tokens of a codebook or vocabulary."""

    def make(forward: ForwardInputs) -> Tensor:
        top, *shape = forward.sizes((limit, *sizes)) or (1,)
        return torch.randint(0, top, (forward.batch, *shape), generator=forward.rng)

    return make


def per_image(maker: Maker) -> Maker:
    """The result (B, ...) of ``maker`` as a list of B tensors (...)."""
    return lambda forward: [*maker(forward)]


def list_of(count: Size, maker: Maker) -> Maker:
    """A list of ``count`` results of ``maker``."""
    return lambda forward: [maker(forward) for _ in range(forward.size(count) or 0)]


def constant(value: Any) -> Maker:
    """The value itself."""
    return lambda forward: value


# --------------------------------------------------------------------------------- positions
def image_ids(axes: int, words: int = 0) -> Maker:
    """(words + TOKENS, axes) int64: zeros for words, then row and column on axes 1 and 2."""

    def make(forward: ForwardInputs) -> Tensor:
        ids = torch.zeros(words + TOKENS, axes, dtype=torch.long)
        ids[words:, 1] = torch.arange(SIDE).repeat_interleave(SIDE)
        ids[words:, 2] = torch.arange(SIDE).repeat(SIDE)
        return ids

    return make


def text_ids(*axes: int, of: int) -> Maker:
    """(WORDS, of) int64: index of the word on the given axes, zero on others."""

    def make(forward: ForwardInputs) -> Tensor:
        ids = torch.zeros(WORDS, of, dtype=torch.long)
        ids[:, axes] = torch.arange(WORDS)[:, None]
        return ids

    return make


def indices(*counts: int) -> Maker:
    """(count,) int64, 0 to count - 1; a list of these for several counts."""

    def make(forward: ForwardInputs) -> Any:
        ranges = [torch.arange(count) for count in counts]
        return ranges if len(ranges) > 1 else ranges[0]

    return make


def frame_indices(first: int, count: int) -> Maker:
    """(B, count) int64: consecutive indices of frames."""
    return batched(lambda forward: torch.arange(first, first + count))


def batched(maker: Maker) -> Maker:
    """(B, ...): B copies of the result of ``maker``, a tensor (...) or a tuple of tensors."""

    def make(forward: ForwardInputs) -> Any:
        one = maker(forward)
        if isinstance(one, tuple):
            return tuple(t.expand(forward.batch, *t.shape).clone() for t in one)
        return one.expand(forward.batch, *one.shape).clone()

    return make


def image_shapes(forward: ForwardInputs) -> list[list[tuple[int, int, int]]]:
    """Frames, rows and columns of the one packed image in each entry of the batch."""
    return [[(1, SIDE, SIDE)] for _ in range(forward.batch)]


def rotary_embedding(tokens: Size, width: Size) -> Maker:
    """Cosines and sines, (tokens, width) each, of positions along one axis."""

    def make(forward: ForwardInputs) -> tuple[Tensor, Tensor]:
        count, size = forward.sizes((tokens, width)) or (0, 0)
        rates = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(count), rates).repeat_interleave(2, 1)  # (tokens, width)
        return angles.cos(), angles.sin()

    return make


# ------------------------------------------------------------------------ for one model only
def labels(forward: ForwardInputs) -> Tensor:
    """(B,) random classes; the null class in the second half of the batch, as in guidance."""
    classes = forward.config.num_embeds_ada_norm
    ids = torch.randint(0, classes, (forward.batch,), generator=forward.rng)
    ids[forward.batch // 2 :] = classes
    return ids


def resolution(forward: ForwardInputs) -> dict[str, Tensor | None]:
    """PixArt alpha: height and width (B, 2), aspect ratio (B, 1); sigma: None for both."""
    if not forward.config.get("use_additional_conditions"):
        return {"resolution": None, "aspect_ratio": None}
    size = torch.full((forward.batch, 2), 1024.0)
    return {"resolution": size, "aspect_ratio": torch.ones(forward.batch, 1)}


def lumina_rotary_embedding(forward: ForwardInputs) -> Tensor:
    """(384, 384, head / 2) complex: rows rotate the even channels, columns the odd ones."""
    side, half = 384, forward.config.hidden_size // forward.config.num_attention_heads // 2
    angles = torch.outer(torch.arange(side), 10000.0 ** (-torch.arange(0, half, 2) / half))
    rows, columns = angles[:, None].expand(-1, side, -1), angles.expand(side, -1, -1)
    both = torch.stack([rows, columns], -1).flatten(2)  # (384, 384, head / 2)
    return torch.polar(torch.ones_like(both), both)


def first_frame(forward: ForwardInputs) -> Tensor:
    """HunyuanVideo 1.5: features (B, WORDS, K) of the first frame, zero for text to video."""
    shape = forward.batch, WORDS, forward.config.image_embed_dim
    scale = 0.0 if forward.config.task_type == "t2v" else 1.0
    return scale * torch.randn(shape, generator=forward.rng)


def cosmos_condition(forward: ForwardInputs) -> Any:
    """Text (B, WORDS, K); for models with image context a pair of it and (B, tokens, K)."""
    config = forward.config
    width = "crossattn_proj_in_channels" if config.use_crossattn_projection else "text_embed_dim"
    text = noise(WORDS, width)(forward)
    if not config.get("img_context_dim_in"):
        return text
    return text, noise("img_context_num_tokens", "img_context_dim_in")(forward)
