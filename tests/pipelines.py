# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of the real classes with text encoders: random weights, no files, no network."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = 64


def tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    """A tokenizer of letters, so that every prompt has a few tokens."""
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *map(chr, range(33, 94))])}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def clip(width: int = 32, projected: bool = False) -> Any:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=2,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(width: int = 64, kind: Any = T5EncoderModel) -> Any:
    torch.manual_seed(3)
    config = (UMT5Config if kind is UMT5EncoderModel else T5Config)(
        vocab_size=WORDS, d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2
    )
    return kind(config).eval()


def vae(channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=channels,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    ).eval()


def pixart() -> DiffusionPipeline:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=tiny.pixart(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sd3() -> DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(
        transformer=tiny.sd3(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(projected=True),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(projected=True),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(77),
    )


def flux() -> DiffusionPipeline:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(64),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(77),
        transformer=tiny.flux(),
    )


def wan(two: bool = False) -> DiffusionPipeline:
    second = {"transformer_2": tiny.wan(), "boundary_ratio": 0.8} if two else {}
    return diffusers.WanPipeline(transformer=tiny.wan(), **second, **wan_parts())


def wan_parts() -> dict[str, Any]:
    torch.manual_seed(4)
    video_vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer(),
        "text_encoder": t5(kind=UMT5EncoderModel),
        "vae": video_vae.eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def wan_from_image() -> DiffusionPipeline:
    """The transformer gets latents, a mask and the latents of the image."""
    return diffusers.WanImageToVideoPipeline(transformer=tiny.wan(12), **wan_parts())


def kontext() -> DiffusionPipeline:
    """FLUX that edits an image."""
    return diffusers.FluxKontextPipeline(**flux().components)


def sd3_from_image() -> DiffusionPipeline:
    return diffusers.StableDiffusion3Img2ImgPipeline(**sd3().components)


def inpaint() -> DiffusionPipeline:
    return diffusers.FluxInpaintPipeline(**flux().components)


def wan_two() -> DiffusionPipeline:
    return wan(two=True)


PIPELINES = {"pixart": pixart, "sd3": sd3, "flux": flux, "wan": wan, "wan 2.2": wan_two}

# pipelines that need an image, some also a mask
FROM_IMAGES = {
    "wan i2v": wan_from_image,
    "kontext": kontext,
    "sd3 img2img": sd3_from_image,
    "inpaint": inpaint,
}

# arguments that make a call small
SMALL: dict[str, dict[str, Any]] = {
    "pixart": {"height": 16, "width": 16, "use_resolution_binning": False},
    "sd3": {"height": 16, "width": 16},
    "flux": {"height": 16, "width": 16},
    "wan": {"height": 16, "width": 16, "num_frames": 5},
    "wan 2.2": {"height": 16, "width": 16, "num_frames": 5},
    "wan i2v": {"height": 16, "width": 16, "num_frames": 5},
    "kontext": {"height": 16, "width": 16, "_auto_resize": False, "max_area": 256},
    "sd3 img2img": {"height": 16, "width": 16},
    "inpaint": {"height": 16, "width": 16},
}


def sample(pipe: DiffusionPipeline, name: str, steps: int = 4) -> torch.Tensor:
    """Two images or videos."""
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    out = pipe(
        ["A CAT", "TWO DOGS"],
        generator=generator,
        num_inference_steps=steps,
        output_type="pt",
        **SMALL[name],
    )
    return torch.as_tensor(out.images if hasattr(out, "images") else out.frames)
