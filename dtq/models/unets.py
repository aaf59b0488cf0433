# SPDX-License-Identifier: Apache-2.0
"""U-Nets of diffusers: the arguments of one forward, for the table of families."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dtq.models.dummy_inputs import (
    FRAMES,
    WORDS,
    ForwardInputs,
    Maker,
    Size,
    full,
    noise,
    timestep,
    timestep_index,
)


def _height(config: Any) -> int:
    """Rows of the latents; 32 where the configuration leaves the size to the caller."""
    size = config.sample_size or 32
    return int(size if isinstance(size, int) else size[0])


def _width(config: Any) -> int:
    """Columns of the latents."""
    size = config.sample_size or 32
    return int(size if isinstance(size, int) else size[-1])


def _samples(*sizes: Size, at: Maker = timestep_index) -> dict[str, Maker]:
    """Latents (B, *sizes) and their timestep; U-Nets call them a sample."""
    return {"sample": noise(*sizes), "timestep": at}


def _text_width(config: Any) -> int:
    """Channels of the embedded text: those before the projection, if there is one."""
    width = config.get("encoder_hid_dim") or config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def _inner_width(config: Any) -> int:
    """Channels of the text that cross-attention reads."""
    width = config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def added_conditions(forward: ForwardInputs) -> dict[str, Tensor]:
    """``added_cond_kwargs``: pooled text and image sizes of SDXL, images of Kandinsky 2."""
    config = forward.config
    kind, projection = config.get("addition_embed_type"), config.get("encoder_hid_dim_type")
    added: dict[str, Maker] = {}
    if kind == "text_time":
        ids = 6 * config.addition_time_embed_dim
        width = config.projection_class_embeddings_input_dim - ids
        added = {"text_embeds": noise(width), "time_ids": full(1024.0, 6)}
    elif kind == "text_image":
        added = {"text_embeds": noise(_inner_width), "image_embeds": noise(_inner_width)}
    elif kind in ("image", "image_hint") or projection == "image_proj":
        added = {"image_embeds": noise("encoder_hid_dim")}
    if kind == "image_hint":  # an image of eight times the size of the latents
        added["hint"] = noise(3, lambda c: 8 * _height(c), lambda c: 8 * _width(c))
    return {name: maker(forward) for name, maker in added.items()}


def class_labels(forward: ForwardInputs) -> Tensor | None:
    """Labels (B,), or the vector (B, K) that is projected instead; None for models without."""
    config, kind = forward.config, forward.config.get("class_embed_type")
    if kind in ("projection", "simple_projection"):
        return noise("projection_class_embeddings_input_dim")(forward)  # type: ignore[no-any-return]
    if kind == "identity":
        return noise(lambda c: 4 * c.block_out_channels[0])(forward)  # type: ignore[no-any-return]
    if kind == "timestep" or config.get("num_class_embeds"):
        return forward.timestep.long() * 0
    return None


def text_per_frame(forward: ForwardInputs) -> Tensor:
    """Embedded text (B * FRAMES, WORDS, K): pipelines with motion modules repeat it."""
    text: Tensor = noise(WORDS, _text_width)(forward)
    return text.repeat_interleave(FRAMES, 0)


def control_image(forward: ForwardInputs) -> Tensor:
    """An image (B, 3, H, W), which an embedder halves to the size of the latents."""
    times = 2 ** (len(forward.config.ctrl_conditioning_embedding_out_channels) - 1)
    made: Tensor = noise(3, lambda c: times * _height(c), lambda c: times * _width(c))(forward)
    return made


_IMAGE = _samples("in_channels", _height, _width)
_VIDEO = _samples("in_channels", FRAMES, _height, _width)
_TEXT = {"encoder_hidden_states": noise(WORDS, _text_width)}
_CONDITIONS: dict[str, Maker] = {
    **_TEXT,
    "class_labels": class_labels,
    "timestep_cond": noise("time_cond_proj_dim"),
    "added_cond_kwargs": added_conditions,
}

UP_TO_1000: dict[tuple[str, ...], dict[str, Maker]] = {
    ("unet", "UNet2DModel"): {**_IMAGE, "class_labels": class_labels},
    ("unet-text", "UNet2DConditionModel", "DreamLiteUNetModel"): {**_IMAGE, **_CONDITIONS},
    ("unet-controlled", "UNetControlNetXSModel"): {
        **_samples(4, _height, _width),
        **_TEXT,
        "added_cond_kwargs": added_conditions,
        "controlnet_cond": control_image,
    },
    ("unet-video", "UNet3DConditionModel"): {**_VIDEO, **_TEXT},
    ("unet-motion", "UNetMotionModel"): {
        **_VIDEO,
        "encoder_hidden_states": text_per_frame,
        "added_cond_kwargs": added_conditions,
    },
    ("i2vgen-xl", "I2VGenXLUNet"): {
        **_VIDEO,
        **_TEXT,
        "fps": full(8),
        "image_latents": noise("in_channels", FRAMES, _height, _width),
        "image_embeddings": noise(_inner_width),
    },
    ("kandinsky3", "Kandinsky3UNet"): {
        **_samples("in_channels", 32, 32),
        **_TEXT,
        "encoder_attention_mask": full(1.0, WORDS),
    },
    ("audioldm2", "AudioLDM2UNet2DConditionModel"): {
        **_IMAGE,
        "encoder_hidden_states": noise(8, lambda c: c.cross_attention_dim[0][1]),
        "encoder_hidden_states_1": noise(WORDS, lambda c: c.cross_attention_dim[0][-1]),
    },
}
"""U-Nets whose timesteps are those of their noise schedule."""

UP_TO_1: dict[tuple[str, ...], dict[str, Maker]] = {
    ("unet-1d", "UNet1DModel"): _samples("in_channels", "sample_size", at=timestep),
    ("stable-cascade", "StableCascadeUNet"): {
        "sample": noise("in_channels", 24, 24),
        "timestep_ratio": timestep,
        "clip_text_pooled": noise(1, "clip_text_pooled_in_channels"),
        "clip_text": noise(WORDS, "clip_text_in_channels"),
        "clip_img": noise(1, "clip_image_in_channels"),
        "effnet": noise("effnet_in_channels", 12, 12),
    },
}
"""U-Nets whose timesteps go from 0 to 1."""

UP_TO_LOG_SIGMA: dict[tuple[str, ...], dict[str, Maker]] = {
    ("svd", "UNetSpatioTemporalConditionModel"): {
        **_samples(FRAMES, "in_channels", _height, _width, at=timestep),
        "encoder_hidden_states": noise(1, _inner_width),
        "added_time_ids": full(
            6.0, lambda c: c.projection_class_embeddings_input_dim // c.addition_time_embed_dim
        ),
    },
}
"""Stable Video Diffusion, whose timesteps are a quarter of the logarithm of the noise level."""
