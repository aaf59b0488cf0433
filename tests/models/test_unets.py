# SPDX-License-Identifier: Apache-2.0
"""The U-Net of Stable Diffusion XL in its real size, without weights."""

from __future__ import annotations

import math

import diffusers
import torch

from dtq.pipelines.tracing import scan_model
from dtq.recipe import Recipe

# unet/config.json of stabilityai/stable-diffusion-xl-base-1.0; keys with their default are left out
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def test_w4a8_quantizes_most_of_sdxl():
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**SDXL).eval()
    total = sum(p.numel() for p in model.parameters())
    assert total == 2_567_463_684  # as published
    scan = scan_model(model)
    assert scan.traced
    assert not scan.uncalled
    plan = Recipe.load("w4a8").plan(scan)
    quantized = plan.quantized()
    assert sum(math.prod(layer.shape) for layer in quantized) >= 0.8 * total
    assert {layer.weight_format for layer in plan.gemm()} == {"int4-2l-g64"}
    rows = {role: scan.rows[name] for name, role in FIRST.items()}
    assert rows == {"ffn.up": 2 * 64 * 64, "xattn.k": 2 * 32, "attn.q": 2 * 32 * 32}


FIRST = {
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": "ffn.up",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "xattn.k",
    "down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q": "attn.q",
}
"""Each sees another number of tokens."""
