# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of the real classes with text encoders: random weights, no files, no network."""

from __future__ import annotations

from typing import Any

import diffusers
import text_encoders
import tiny
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
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


def unet(**more: Any) -> Any:
    """Two resolutions, each with attention, 64 and 128 channels wide."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 64,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**config | more).eval()


def sd15() -> DiffusionPipeline:
    """1 x 1 convolutions into and out of the transformers, eight heads everywhere."""
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(64),
        tokenizer=tokenizer(77),
        unet=unet(attention_head_dim=8),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> DiffusionPipeline:
    """Linears into and out of the transformers, two text encoders, the first blocks convolve only."""
    model = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True),
        tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77),
        unet=model,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


def svd() -> DiffusionPipeline:
    """Stable Video Diffusion: an image starts the video, and there is no text."""
    torch.manual_seed(0)
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=32,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=3,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    video_vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=16,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=32,
        projection_dim=32,
    )
    return diffusers.StableVideoDiffusionPipeline(
        vae=video_vae.eval(),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        unet=model.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=CLIPImageProcessor(),
    )


def ideogram4() -> DiffusionPipeline:
    """Its text encoder has two layers: set ``QWEN3_VL_ACTIVATION_LAYERS`` of its module to (0, 1)."""
    torch.manual_seed(0)
    size = {
        "in_channels": 16, "num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
        "intermediate_size": 64, "adaln_dim": 16, "llm_features_dim": 2 * 64,
        "mrope_section": (8, 4, 4),
    }  # fmt: skip
    first, second = (diffusers.Ideogram4Transformer2DModel(**size).eval() for _ in range(2))
    letters = tokenizer(64)
    letters.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    return diffusers.Ideogram4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=text_encoders.model("Qwen3VLModel"),
        tokenizer=letters,
        transformer=first,
        unconditional_transformer=second,
    )


def wan_two() -> DiffusionPipeline:
    return wan(two=True)


PIPELINES = {"pixart": pixart, "sd3": sd3, "flux": flux, "wan": wan, "wan 2.2": wan_two}

U_NETS = {"sd 1.5": sd15, "sdxl": sdxl, "svd": svd}

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
    "sd 1.5": {"height": 16, "width": 16},
    "sdxl": {"height": 16, "width": 16},
    "svd": {"height": 16, "width": 16, "num_frames": 3, "decode_chunk_size": 3},
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
