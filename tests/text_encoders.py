# SPDX-License-Identifier: Apache-2.0
"""Every text-encoder class that a pipeline of diffusers names, as a tiny random model.

The classes are read from the type hints of diffusers' pipelines. A class is a text encoder when it
reads ``input_ids``.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import itertools
from pathlib import Path
from typing import Any

import diffusers.pipelines
import torch
import transformers
from torch import nn

SMALL = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
DECODER = {
    **SMALL, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 1, "temporal_patch_size": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
GEMMA3 = {**DECODER, "sliding_window": 16, "query_pre_attn_scalar": 16}
QWEN3_VL = {
    "text_config": {**DECODER, "rope_parameters": MROPE},
    "vision_config": {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64,
                      "intermediate_size": 64, "num_position_embeddings": 16,
                      "deepstack_visual_indexes": [0]},
    "image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96,
    "vision_end_token_id": 95,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "BertModel": SMALL,
    "CLIPTextModel": {**SMALL, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "CLIPTextModelWithProjection": {
        **SMALL, "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    },
    "ClapTextModelWithProjection": {**SMALL, "projection_dim": 32, "max_position_embeddings": 66},
    "GPT2LMHeadModel": {
        "vocab_size": 99, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "Gemma2Model": {**DECODER, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "Gemma3ForConditionalGeneration": {
        "text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 4,
        "image_token_index": 98, "boi_token_index": 96, "eoi_token_index": 97,
    },
    "Gemma4UnifiedForConditionalGeneration": {
        "text_config": {**DECODER, "sliding_window": 16, "global_head_dim": 16},
        "vision_config": {"patch_size": 4, "mm_embed_dim": 32, "mm_posemb_size": 16,
                          "output_proj_dims": 64},
        "audio_config": {"audio_embed_dim": 32},
        "image_token_id": 98, "video_token_id": 97, "audio_token_id": 96, "boi_token_id": 95,
        "eoi_token_id": 94, "boa_token_id": 93, "eoa_token_index": 92,
    },
    "GemmaModel": DECODER,
    "GlmModel": DECODER,
    "GlmImageForConditionalGeneration": {
        "text_config": {**DECODER, "vision_vocab_size": 32,
                        "rope_parameters": {**MROPE, "mrope_section": [2, 3, 3]}},
        "vision_config": {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 64,
                          "image_size": 28},
        "vq_config": {"embed_dim": 16, "num_embeddings": 32, "latent_channels": 32},
        "image_token_id": 98, "image_start_token_id": 30, "image_end_token_id": 31,
    },
    "LlamaForCausalLM": DECODER,
    "LlamaModel": DECODER,
    "LlavaForConditionalGeneration": {
        "text_config": {"model_type": "llama", **DECODER},
        "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
        "image_token_index": 98,
    },
    "Ministral3ForCausalLM": DECODER,
    "Mistral3ForConditionalGeneration": {
        "text_config": {"model_type": "mistral", **DECODER},
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 16},
        "image_token_index": 98,
    },
    "Mistral3Model": {
        "text_config": {"model_type": "mistral", **DECODER},
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 16},
        "image_token_index": 98,
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": {**DECODER, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64},
        "image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96,
        "vision_end_token_id": 95,
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {**DECODER, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64,
                          "intermediate_size": 64, "fullatt_block_indexes": [0]},
        "image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96,
        "vision_end_token_id": 95,
    },
    "Qwen2_5_VLTextModel": {**DECODER, "rope_parameters": MROPE},
    "Qwen3ForCausalLM": DECODER,
    "Qwen3Model": DECODER,
    "Qwen3VLForConditionalGeneration": QWEN3_VL,
    "Qwen3VLModel": QWEN3_VL,
    "SmolLM3ForCausalLM": DECODER,
    "T5EncoderModel": T5,
    "T5Gemma2Encoder": {
        "text_config": {**GEMMA3, "dropout_rate": 0.0},
        "vision_config": {"model_type": "siglip_vision_model", **VISION}, "mm_tokens_per_image": 4, "image_token_index": 98, "boi_token_index": 96,
        "eoi_token_index": 97,
    },
    "T5GemmaEncoder": {
        **DECODER, "sliding_window": 16, "query_pre_attn_scalar": 16, "dropout_rate": 0.0,
    },
    "T5GemmaEncoderModel": {
        "encoder": {**DECODER, "sliding_window": 16, "query_pre_attn_scalar": 16},
        "decoder": {**DECODER, "sliding_window": 16, "query_pre_attn_scalar": 16},
        "vocab_size": 99, "is_encoder_decoder": False,
    },
    "UMT5EncoderModel": T5,
}  # fmt: skip

T5GEMMA = "transformers.models.t5gemma.configuration_t5gemma"

ABSTRACT = {
    "Gemma2PreTrainedModel": "Gemma2Model",
    "GemmaPreTrainedModel": "GemmaModel",
    "PreTrainedModel": "BertModel",
}
"""Base classes in type hints, and the class that stands for them here."""

NOT_TEXT = {
    "SiglipModel": "compares images with images; its pipelines call its vision tower alone",
    "ClapModel": "compares text with sound; its pipelines call get_text_features, not its forward",
    "VitsModel": "synthesizes speech from characters with a flow; its text encoder is a part of it",
    "Gemma4ForConditionalGeneration": "rewrites prompts as text, and encodes nothing",
}
"""Classes with ``input_ids`` in type hints that are no text encoders, and why."""


@functools.cache
def named_by_pipelines() -> frozenset[str]:
    """Names of the classes of transformers in the type hints of diffusers' pipelines."""
    names = set()
    for file in Path(diffusers.pipelines.__path__[0]).rglob("pipeline_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        blocks = (x.body for x in tree.body if isinstance(x, ast.If | ast.Try))
        imported = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in (*tree.body, *itertools.chain(*blocks))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers")
            for alias in node.names
        }
        classes = (x for x in tree.body if isinstance(x, ast.ClassDef))
        for function in (part for kind in classes for part in kind.body):
            if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                for argument in (*function.args.args, *function.args.kwonlyargs):
                    hints = ast.walk(argument.annotation) if argument.annotation else ()
                    words = {getattr(n, "id", getattr(n, "value", None)) for n in hints}
                    names |= {imported[w] for w in words if isinstance(w, str) and w in imported}
    kinds = {name: _class(module, name) for module, name in names}
    return frozenset(name for name, kind in kinds.items() if reads_text(kind))


def reads_text(kind: Any) -> bool:
    return (
        isinstance(kind, type)
        and issubclass(kind, transformers.PreTrainedModel)
        and kind.main_input_name == "input_ids"
    )


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny model, random, in evaluation mode; no parameter is zero."""
    torch.manual_seed(0)
    kind = kind_of(name)
    config = (
        _class(T5GEMMA, "T5GemmaModuleConfig") if name == "T5GemmaEncoder" else kind.config_class
    )
    built = kind(config(**copy.deepcopy(CONFIGS[name]))).to(dtype)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.is_floating_point() and not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.02)
    return built.eval()


def kind_of(name: str) -> Any:
    """The class of a name."""
    at = "transformers.models.t5gemma.modeling_t5gemma" if name == "T5GemmaEncoder" else ""
    return _class(at or "transformers", name)


def inputs(name: str, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one forward: two captions, the second one with padding."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    ids = torch.randint(3, 90, (2, 12), generator=rng)
    return {"input_ids": ids, "attention_mask": mask}


def output(model: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """The first output of one forward."""
    with torch.no_grad():
        result = model(**arguments)
    return next(v for v in result.values() if isinstance(v, torch.Tensor))
