# SPDX-License-Identifier: Apache-2.0
"""Models that ``dtq bench`` times, float and quantized."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtq.api import quantize
from dtq.demo import folder as demo_folder

CALLS = 6
"""Calls that every library calibrates a model on, if it needs any."""

Inputs = dict[str, Any]
"""Keyword arguments of a forward."""


@dataclass
class Case:
    """A float32 model and the inputs of its forward.

    Attributes:
        name: of the row.
        model: in evaluation mode.
        inputs: keyword arguments.
        tokens: of a sample.
    """

    name: str
    model: nn.Module
    inputs: Inputs
    tokens: int


def cases(quick: bool, case: str) -> Iterator[Case]:
    """Shapes of DiT-XL/2, PixArt and FLUX with random weights, and the demo.

    A model has few blocks: all of them do the same work.

    Args:
        quick: only DiT-XL/2 with 256 tokens, PixArt and the demo, with two blocks.
        case: only models whose names contain this text; the others are not built.
    """
    blocks = 2 if quick else 4
    pixart = f"PixArt-alpha shape, {blocks} blocks, 256 tokens + 120 of text, batch 2"
    flux = "FLUX.1 shape, 1 double and 2 single blocks, 1024 + 128 tokens"
    makes: list[tuple[str, int, Callable[[], tuple[nn.Module, Inputs]]]] = [
        (dit_name(blocks, 256), 256, lambda: dit_like(blocks, 32)),
        *([] if quick else [(dit_name(2, 1024), 1024, lambda: dit_like(2, 64))]),
        (pixart, 256, lambda: _pixart(blocks)),
        *([] if quick else [(flux, 1152, lambda: flux_like(1, 2))]),
        ("demo, 64 tokens, batch 2", 64, _demo),
    ]
    for name, tokens, make in makes:
        if case in name:
            torch.manual_seed(0)
            yield Case(name, *make(), tokens)


def dit_name(blocks: int, tokens: int) -> str:
    """Name of the case of some blocks of DiT-XL/2 for two images of so many tokens."""
    return f"DiT-XL/2 shape, {blocks} blocks, {tokens} tokens, batch 2"


def dit_case(blocks: int, tokens: int) -> Case:
    """Some blocks of DiT-XL/2 for two images of so many tokens."""
    return Case(dit_name(blocks, tokens), *dit_like(blocks, 2 * math.isqrt(tokens)), tokens)


def dit_like(
    blocks: int, side: int, heads: int = 16, head_width: int = 72
) -> tuple[nn.Module, Inputs]:
    """A DiT with random weights, and inputs for two images.

    Args:
        blocks: how many; 28 in DiT-XL/2.
        side: of the latents in pixels; a token is 2 x 2 of them.
        heads: of attention.
        head_width: channels of a head.

    Returns:
        The model in float32, in evaluation mode; its inputs.
    """
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_width, in_channels=4, out_channels=8,
        num_layers=blocks, sample_size=side, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return _drawn(model), _labeled(side)


def flux_like(
    double_blocks: int,
    single_blocks: int,
    heads: int = 24,
    text_width: int = 4096,
    image: int = 1024,
    text: int = 128,
    guidance: bool = False,
) -> tuple[nn.Module, Inputs]:
    """A FLUX.1 with random weights, and inputs for one image.

    Args:
        double_blocks: how many; 19 in FLUX.1.
        single_blocks: how many; 38 in FLUX.1.
        heads: of attention, 128 channels each.
        text_width: channels of the text encoding.
        image: tokens.
        text: tokens.
        guidance: whether the model embeds the guidance scale, as FLUX.1-dev does.

    Returns:
        The model in float32, in evaluation mode; its inputs.
    """
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=double_blocks, num_single_layers=single_blocks, num_attention_heads=heads,
        attention_head_dim=128, joint_attention_dim=text_width, guidance_embeds=guidance,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, image, 64),
        "encoder_hidden_states": torch.randn(1, text, text_width),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.zeros(image, 3),
        "txt_ids": torch.zeros(text, 3),
    }
    return _drawn(model), inputs | ({"guidance": torch.full((1,), 4.0)} if guidance else {})


def flux(device: torch.device, quick: bool) -> tuple[nn.Module, Inputs, int]:
    """Blocks of FLUX.1 on a GPU, 4096 + 512 tokens: a bfloat16 model, its inputs, the tokens."""
    small = device.type == "cpu"  # only in tests
    few = quick or small
    heads = 2 if small else 24
    image, text = (16, 8) if small else (4096, 512)
    with device:
        model, inputs = flux_like(
            1 if few else 4, 2 if few else 8, heads, 64 * heads, image, text, guidance=True
        )
    return model.to(torch.bfloat16), cast_floats(inputs, torch.bfloat16), image + text


def dit(device: torch.device, quick: bool) -> tuple[nn.Module, Inputs, int]:
    """DiT-XL/2 on a GPU, 1024 tokens and two images: a bfloat16 model, its inputs, the tokens."""
    small = device.type == "cpu"
    blocks, side = 2 if small else 7 if quick else 28, 8 if small else 64
    with device:
        model, inputs = dit_like(blocks, side, 2 if small else 16, 64 if small else 72)
    return model.to(torch.bfloat16), cast_floats(inputs, torch.bfloat16), (side // 2) ** 2


def _demo() -> tuple[nn.Module, Inputs]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(demo_folder() / "transformer")
    return model.eval(), _labeled(model.config.sample_size)


def _labeled(side: int) -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, side, side),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


def _pixart(blocks: int) -> tuple[nn.Module, Inputs]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
        num_layers=blocks, sample_size=32, patch_size=2, caption_channels=4096,
        cross_attention_dim=1152,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 32, 32),
        "encoder_hidden_states": torch.randn(2, 120, 4096),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return _drawn(model), inputs


def _drawn(model: nn.Module) -> nn.Module:
    """Draw the weights of all linears so that outputs have the variance of inputs.

    The initial weights of some classes are so small that blocks hardly change the output. Errors
    in a block would then hardly show, either.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model.eval()


def calibration_calls(inputs: Inputs, count: int = CALLS) -> list[Inputs]:
    """Calls to calibrate on: other random tensors of the shapes in ``inputs``.

    Args:
        inputs: of a forward. Positions and everything that is no tensor stay.
        count: how many calls; their timesteps are spread over the whole range.

    Returns:
        The keyword arguments of each call.
    """
    if "timestep" not in inputs:
        raise ValueError("inputs of a diffusion transformer have a timestep")
    largest = 1.0 if inputs["timestep"].is_floating_point() else 1000
    calls = []
    for i in range(count):
        call = inputs | {
            "timestep": torch.full_like(inputs["timestep"], largest * (i + 0.5) / count)
        }
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
            if name in inputs:
                call[name] = torch.randn_like(inputs[name])
        calls.append(call)
    return calls


def cast_floats(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with floating-point tensors in another dtype."""
    floats = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return inputs | {k: v.to(dtype) for k, v in floats.items()}


def quantized_model(
    model: nn.Module,
    recipe: str,
    calls: Sequence[Inputs],
    modulation: str = "w8a16",
    attention: str = "float",
    exclude: tuple[str, ...] = ("embed", "head"),
) -> nn.Module:
    """A bfloat16 copy as ``dtq.quantize`` makes it, rotated and rounded to nearest.

    A solver or a search would take longer here and lower the error, and would change neither the
    work nor the time of a step.

    Args:
        model: float.
        recipe: a key of ``RECIPES``.
        calls: to calibrate on.
        modulation: of the recipe, see :class:`dtq.Recipe`.
        attention: of the recipe; ``int8`` where the error of the step allows it.
        exclude: of the recipe, roles that stay float.

    Returns:
        The copy, in evaluation mode.
    """
    return quantize(
        copy.deepcopy(model).bfloat16(),
        recipe,
        inputs=[cast_floats(call, torch.bfloat16) for call in calls],
        transform="hadamard",
        solver="rtn",
        modulation=modulation,
        attention=attention,
        exclude=exclude,
        progress=False,
    ).eval()
