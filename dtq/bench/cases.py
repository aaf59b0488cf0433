# SPDX-License-Identifier: Apache-2.0
"""Layers and models that ``dtq bench`` times: float ones, and their quantized forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dtq.demo import folder as demo_folder
from dtq.formats import FORMATS
from dtq.nn import QuantLinear
from dtq.nn.gelu import use_fast_gelu
from dtq.plan.layers import LayerSpec
from dtq.recipe.resolve import MODULATION

OURS = {"w8a8": "int8-row", "w4a8": "int4-2l-g64"}
"""Recipes and the format of their weights."""


@dataclass
class Case:
    """A float32 model and what it is called with.

    Attributes:
        tokens: of a sample.
    """

    name: str
    model: nn.Module
    given: dict[str, Any]
    tokens: int


def cases(quick: bool) -> Iterator[Case]:
    """Shapes of DiT-XL/2, PixArt and FLUX with random weights, and the demo."""
    torch.manual_seed(0)
    blocks = 4 if quick else 28
    for tokens in (256,) if quick else (256, 1024):
        yield _dit(blocks, tokens)
    yield _pixart(blocks)
    yield _flux()
    yield _demo()


def _dit(blocks: int, tokens: int) -> Case:
    from diffusers import DiTTransformer2DModel

    side = 2 * math.isqrt(tokens)
    model = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
        num_layers=blocks, sample_size=side, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    name = f"DiT-XL/2 shape, {blocks} blocks, {tokens} tokens, batch 2"
    return Case(name, model.eval(), _labelled(side), tokens)


def _demo() -> Case:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(demo_folder() / "transformer")
    side = model.config.sample_size
    tokens = (side // model.config.patch_size) ** 2
    return Case("demo, batch 2", model.eval(), _labelled(side), tokens)


def _labelled(side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, side, side),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


def _pixart(blocks: int) -> Case:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
        num_layers=blocks, sample_size=32, patch_size=2, caption_channels=4096,
        cross_attention_dim=1152,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 4, 32, 32),
        "encoder_hidden_states": torch.randn(2, 120, 4096),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    name = f"PixArt-alpha shape, {blocks} blocks, 256 tokens + 120 of text, batch 2"
    return Case(name, model.eval(), given, 256)


def _flux() -> Case:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=2, num_attention_heads=24, attention_head_dim=128,
        joint_attention_dim=4096,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 1024, 64),
        "encoder_hidden_states": torch.randn(1, 128, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.zeros(1024, 3),
        "txt_ids": torch.zeros(128, 3),
    }
    name = "FLUX.1 shape, 1 double and 2 single blocks, 1024 + 128 tokens"
    return Case(name, model.eval(), given, 1152)


def quantized(layer: nn.Linear, weights: str, acts: str = "int8-row") -> QuantLinear:
    """The layer as a recipe leaves it, smoothed and rotated online; rounded to nearest."""
    fmt, w = FORMATS[weights], layer.weight.detach().float()
    block = 64 if layer.in_features % 64 == 0 else 1
    new = QuantLinear.in_place_of(
        layer, LayerSpec(weights, acts, block, True), compute_dtype=torch.bfloat16
    )
    parts = fmt.pack(w, fmt.compute_qparams(w))
    parts["pre_quant_scale"] = torch.ones(1, layer.in_features, dtype=torch.bfloat16)
    new.fill(parts)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().bfloat16(), requires_grad=False)
    return new


def quantized_model(
    model: nn.Module, name: str, modulation: str | None = MODULATION["w8a16"]
) -> nn.Module:
    """A bfloat16 copy with quantized attention and feed-forward.

    Args:
        modulation: weight-only format of modulation; None leaves it alone.
    """
    made = copy.deepcopy(model).bfloat16()
    for where, layer in list(made.named_modules()):
        if not isinstance(layer, nn.Linear) or "blocks." not in where:
            continue
        if "norm" not in where:
            made.set_submodule(where, quantized(layer, OURS[name]))
        elif modulation and where.endswith(".linear") and layer.in_features % 64 == 0:
            made.set_submodule(where, weight_only(layer, modulation))
    use_fast_gelu(made)
    return made


def weight_only(layer: nn.Linear, weights: str) -> QuantLinear:
    """The layer with packed weights and float activations."""
    new = quantized(layer, weights, "none")
    plain = QuantLinear.in_place_of(
        layer, LayerSpec(weights, "none"), compute_dtype=torch.bfloat16, device=layer.weight.device
    )
    plain.fill({n: t for n, t in new.packed_tensors().items() if n != "pre_quant_scale"})
    plain.bias = new.bias
    return plain
