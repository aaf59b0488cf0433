# SPDX-License-Identifier: Apache-2.0
"""The trained parts of ``demo-text``: two small text encoders and a transformer of the FLUX.1 kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from train_demo.scenes import SIZE, words
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 64  # of both text encoders
LENGTH = 12  # tokens to which the pipeline pads a caption
SIDE = SIZE // 8  # tokens of the transformer per side of the image
_PAD, _END, _UNKNOWN, _BEGIN = "<pad>", "</s>", "<unk>", "<s>"


def new_tokenizer(begin: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per lower-case word of the captions, and an end token.

    Args:
        begin: whether a caption starts with a token of its own, as for CLIP.
    """
    known = [_PAD, _END, _UNKNOWN, _BEGIN, *words()]
    vocabulary = {word: i for i, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A {_END}" if begin else f"$A {_END}",
        special_tokens=[(token, vocabulary[token]) for token in (_BEGIN, _END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        bos_token=_BEGIN if begin else None,
        model_max_length=LENGTH,
    )


def token_ids(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The tokens of captions for CLIP and for T5, int64 (B, LENGTH) each, padded."""
    clip, t5 = (
        new_tokenizer(begin)(
            list(captions), padding="max_length", max_length=LENGTH, return_tensors="pt"
        ).input_ids
        for begin in (True, False)
    )
    return clip, t5


def new_clip() -> CLIPTextModel:
    """One causal layer; its state at the end token is the pooled text."""
    size = len(new_tokenizer(True))
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=3,
        )
    )


def new_t5() -> T5EncoderModel:
    """Two layers; one state per token."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(new_tokenizer(False)),
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def new_transformer(guidance: bool) -> FluxTransformer2DModel:
    """One double and four single blocks of width 192; adaLN-zero, every block starts as the identity.

    Args:
        guidance: whether the guidance scale is an input, as in FLUX.1-dev; else as in -schnell.
    """
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(8, 12, 12),
    )
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for block in model.single_transformer_blocks:
        nn.init.zeros_(block.norm.linear.weight)
        nn.init.zeros_(block.norm.linear.bias)
    for last in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return model


class Painter(nn.Module):
    """Text encoders and transformer, called as ``FluxPipeline`` calls them.

    Args:
        guidance: whether the transformer takes the guidance scale.
    """

    def __init__(self, guidance: bool) -> None:
        super().__init__()
        self.text_encoder = new_clip()
        self.text_encoder_2 = new_t5()
        self.transformer = new_transformer(guidance)
        ids = FluxPipeline._prepare_latent_image_ids(1, SIDE, SIDE, "cpu", torch.float32)
        self.register_buffer("img_ids", ids, persistent=False)
        self.register_buffer("txt_ids", torch.zeros(LENGTH, 3), persistent=False)

    def encode(self, clip: Tensor, t5: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled text (B, WIDTH) and the states (B, LENGTH, WIDTH) of tokens (B, LENGTH)."""
        pooled: Tensor = self.text_encoder(clip).pooler_output
        states: Tensor = self.text_encoder_2(t5).last_hidden_state
        return pooled, states

    def velocity(
        self, x: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], guidance: Tensor | None
    ) -> Tensor:
        """Predict noise minus image.

        Args:
            x: noisy packed latents (B, SIDE**2, 16).
            sigma: share of the noise (B,), 0 to 1.
            text: pooled text and states.
            guidance: scale (B,), if the transformer takes one.

        Returns:
            The shape of x.
        """
        guess: Tensor = self.transformer(
            hidden_states=x,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=text[0],
            encoder_hidden_states=text[1],
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
        ).sample
        return guess


def is_hidden(name: str) -> bool:
    """Whether Muon trains this matrix of a ``Painter``: attention and feed-forward of a block."""
    return "transformer_blocks." in name and "norm" not in name
