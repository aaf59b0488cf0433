# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the real diffusers classes, built in milliseconds, no files, no network."""

from __future__ import annotations

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
)
from torch import nn


def dit(blocks: int = 2, heads: int = 4, seed: int = 0, **more) -> DiTTransformer2DModel:
    """A class-conditional DiT; its modulation is not zero, so that every linear has an effect."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        sample_size=8,
        num_embeds_ada_norm=1000,
        **more,
    )
    return _with_modulation(model)


def pipeline(**more) -> DiTPipeline:
    """A DiT pipeline with a toy VAE."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    )
    return DiTPipeline(dit(**more), vae.eval(), DDIMScheduler())


def pixart() -> nn.Module:
    torch.manual_seed(0)
    return _with_modulation(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            cross_attention_dim=128,
            caption_channels=64,
            num_embeds_ada_norm=1000,
        )
    )


def sd3(heads: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return _with_modulation(
        diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=heads,
            caption_projection_dim=32 * heads,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            out_channels=4,
            pos_embed_max_size=16,
        )
    )


def flux(heads: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return _with_modulation(
        diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=heads,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(8, 12, 12),
        )
    )


def wan(inputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return _with_modulation(
        diffusers.WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=inputs,
            out_channels=4,
            text_dim=64,
            freq_dim=64,
            ffn_dim=256,
            num_layers=2,
        )
    )


TRANSFORMERS = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "wan": wan}


def sample(pipe: DiTPipeline, seed: int = 0, steps: int = 3) -> torch.Tensor:
    """Two images, float (2, 3, H, W)."""
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    images = pipe([1, 7], generator=generator, num_inference_steps=steps, output_type="pt").images
    return torch.as_tensor(images)


def _with_modulation(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "norm" in name:
            nn.init.normal_(module.weight, std=0.05)
    return model.eval()


class TwoStages(DiffusionPipeline):
    """A pipeline whose first steps are one transformer's, the others another's, as in Wan 2.2."""

    def __init__(self, transformer, transformer_2, scheduler):
        super().__init__()
        self.register_modules(
            transformer=transformer, transformer_2=transformer_2, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(self, class_labels, generator=None, num_inference_steps=4, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generator])
        labels = torch.tensor(class_labels)
        for i, t in enumerate(self.scheduler.timesteps):
            model = self.transformer if i < num_inference_steps / 2 else self.transformer_2
            noise = model(x, timestep=t.expand(len(x)), class_labels=labels).sample
            x = self.scheduler.step(noise, t, x).prev_sample
        return ImagePipelineOutput(images=x)


def two_stages() -> TwoStages:
    return TwoStages(dit(), dit(seed=1), DDIMScheduler())
