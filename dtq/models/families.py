# SPDX-License-Identifier: Apache-2.0
"""``FAMILIES``: one row per family of transformers and U-Nets for images, videos or audio.

Timesteps go up to 1 if the pipeline divides the scheduler's timesteps by 1000, or if its scheduler
counts from 0 to 1; otherwise up to 1000. In a pipeline with reversed time, the largest
timestep is that of the clean image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dtq.models import unets
from dtq.models.base import Family
from dtq.models.dummy_inputs import (
    FRAMES,
    SIDE,
    TOKENS,
    WORDS,
    Maker,
    Size,
    arguments,
    batched,
    constant,
    cosmos_condition,
    first_frame,
    frame_indices,
    full,
    guidance,
    image_ids,
    image_shapes,
    indices,
    labels,
    list_of,
    lumina_rotary_embedding,
    mask,
    noise,
    per_image,
    random_ids,
    resolution,
    rotary_embedding,
    text_ids,
    timestep,
    timestep_index,
    timestep_per,
    when,
)


def _latents(*sizes: Size, at: Maker = timestep) -> dict[str, Maker]:
    """Latents (B, *sizes) and their timestep."""
    return {"hidden_states": noise(*sizes), "timestep": at}


def _text(*sizes: Size) -> dict[str, Maker]:
    """Embedded text (B, WORDS, *sizes)."""
    return {"encoder_hidden_states": noise(WORDS, *sizes)}


def _families(
    rows: Mapping[tuple[str, ...], Mapping[str, Maker]], largest_timestep: float
) -> tuple[Family, ...]:
    """One family per row: its name and the names of its classes, and the arguments of a forward."""
    return tuple(
        Family(name, tuple(classes), arguments(**makers), largest_timestep=largest_timestep)
        for (name, *classes), makers in rows.items()
    )


def _cogvideo_tokens(config: Any) -> int:
    """Tokens of four latent frames."""
    frame = config.sample_height * config.sample_width // config.patch_size**2
    return int(frame * 4 // (config.get("patch_size_t") or 1))


# arguments that several families have in common
_INDEXED = {"timestep": timestep_index}
_SQUARE = _latents("in_channels", "sample_size", "sample_size")
_IMAGE = _latents("in_channels", 32, 32)
_VIDEO = _latents("in_channels", FRAMES, SIDE, SIDE)
_PACKED = _latents(TOKENS, "in_channels")
_AUDIO = _latents("in_channels", TOKENS)
_JOINT = {**_PACKED, **_text("joint_attention_dim")}
_CAPTION = _text("caption_channels")
_TEXT = _text("text_embed_dim")
_MASK = {"encoder_attention_mask": mask(WORDS)}
_POOLED = {"pooled_projections": noise("pooled_projection_dim")}
_IDS_4 = {"img_ids": image_ids(4), "txt_ids": text_ids(3, of=4)}
_CROP = {"target_size": full(1024, 2), "crop_coords": full(0, 2)}
_FLUX = {**_JOINT, "img_ids": image_ids(3), "txt_ids": text_ids(of=3)}
_HUNYUAN = {
    **_TEXT,
    **_MASK,
    "encoder_hidden_states_2": noise(WORDS, "text_embed_2_dim"),
    "encoder_attention_mask_2": mask(WORDS),
    "timestep_r": when("use_meanflow", timestep),
}
_HUNYUAN_VIDEO = {**_VIDEO, **_TEXT, **_MASK, **_POOLED, "guidance": guidance(6000.0)}
_WAN = {
    **_VIDEO | _INDEXED,
    **_text("text_dim"),
    "encoder_hidden_states_image": noise(257, "image_dim"),
}
_ANYFLOW = {
    **_text("text_dim"),
    **_latents(FRAMES, "in_channels", SIDE, SIDE, at=timestep_per(FRAMES)),
    "r_timestep": timestep_per(FRAMES),
}
_LTX = {
    **_latents(FRAMES * TOKENS, "in_channels"),
    "num_frames": constant(FRAMES),
    "height": constant(SIDE),
    "width": constant(SIDE),
}
_COGVIDEO = {
    # four frames, since a patch of CogVideoX 1.5 has two
    **_latents(4, "in_channels", "sample_height", "sample_width", at=timestep_index),
    "encoder_hidden_states": noise("max_text_seq_length", "text_embed_dim"),
    "image_rotary_emb": when(
        "use_rotary_positional_embeddings", rotary_embedding(_cogvideo_tokens, "attention_head_dim")
    ),
}
_KANDINSKY = {
    # channels: the latents, then those of the first frame and a mask of where they are valid
    **_latents(
        FRAMES, 2 * SIDE, 2 * SIDE, lambda c: c.in_visual_dim * (1 + c.visual_cond) + c.visual_cond
    ),
    **_text("in_text_dim"),
    "pooled_projections": noise("in_text_dim2"),
}

_UP_TO_1000: dict[tuple[str, ...], dict[str, Maker]] = {
    # images
    ("dit", "DiTTransformer2DModel"): {**_SQUARE | _INDEXED, "class_labels": labels},
    ("pixart", "PixArtTransformer2DModel"): {
        **_SQUARE | _INDEXED,
        **_text(lambda c: c.get("caption_channels") or c.cross_attention_dim),
        "added_cond_kwargs": resolution,
    },
    ("sd3", "SD3Transformer2DModel"): {**_SQUARE, **_text("joint_attention_dim"), **_POOLED},
    ("bria", "BriaTransformer2DModel"): _FLUX,
    ("bria-fibo", "BriaFiboTransformer2DModel"): {
        **_FLUX,
        "text_encoder_layers": list_of(
            lambda c: c.num_layers + c.num_single_layers, noise(WORDS, "text_encoder_dim")
        ),
    },
    ("sana", "SanaTransformer2DModel"): {**_SQUARE, **_CAPTION, "guidance": guidance(0.45)},
    ("cogview", "CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"): {
        **_SQUARE,
        **_TEXT,
        **_CROP,
        "original_size": full(1024, 2),
    },
    ("hidream", "HiDreamImageTransformer2DModel"): {
        "hidden_states": noise("in_channels", 32, 32),
        "timesteps": timestep,
        "encoder_hidden_states_t5": noise(WORDS, lambda c: c.caption_channels[0]),
        "encoder_hidden_states_llama3": list_of(
            lambda c: max(c.llama_layers) + 1, noise(WORDS, lambda c: c.caption_channels[1])
        ),
        "pooled_embeds": noise("text_emb_dim"),
    },
    ("hunyuan-dit", "HunyuanDiT2DModel"): {
        **_SQUARE,
        "encoder_hidden_states": noise("text_len", "cross_attention_dim"),
        "text_embedding_mask": mask("text_len"),
        "encoder_hidden_states_t5": noise("text_len_t5", "cross_attention_dim_t5"),
        "text_embedding_mask_t5": mask("text_len_t5"),
        "image_meta_size": full(1024, 6),
        "style": full(0, dtype=torch.long),
        "image_rotary_emb": rotary_embedding(
            lambda c: (c.sample_size // c.patch_size) ** 2, "attention_head_dim"
        ),
    },
    ("hunyuan-image", "HunyuanImageTransformer2DModel"): {
        **_IMAGE,
        **_HUNYUAN,
        "guidance": guidance(3500.0),
    },
    ("glm-image", "GlmImageTransformer2DModel"): {
        **_IMAGE,
        **_TEXT,
        "prior_token_id": random_ids("prior_vq_quantizer_codebook_size", TOKENS),
        "prior_token_drop": full(False, TOKENS, dtype=torch.bool),
        **_CROP,
    },
    ("ernie-image", "ErnieImageTransformer2DModel"): {
        **_IMAGE,
        "text_bth": noise(WORDS, "text_in_dim"),
        "text_lens": full(WORDS, dtype=torch.long),
    },
    ("joyimage", "JoyImageEditTransformer3DModel"): {
        **_latents("in_channels", 1, 32, 32),
        **_text("text_dim"),
    },
    ("joyimage-plus", "JoyImageEditPlusTransformer3DModel"): {
        "hidden_states": lambda f: noise(TOKENS, "in_channels", *f.config.patch_size)(f),
        "timestep": timestep,
        "shape_list": image_shapes,
        **_text("text_dim"),
    },
    ("prior", "PriorTransformer"): {
        **_latents("embedding_dim", at=timestep_index),
        "proj_embedding": noise(lambda c: c.embedding_proj_dim or c.embedding_dim),
        "encoder_hidden_states": when(
            "encoder_hid_proj_type", noise("num_embeddings", "embedding_dim")
        ),
    },
    # videos
    (
        "wan",
        "WanTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
    ): _WAN,
    ("wan-vace", "WanVACETransformer3DModel"): {
        **_WAN,
        "control_hidden_states": noise("vace_in_channels", FRAMES, SIDE, SIDE),
    },
    ("wan-animate", "WanAnimateTransformer3DModel"): {
        **_WAN,
        "pose_hidden_states": noise("latent_channels", FRAMES - 1, SIDE, SIDE),
        "face_pixel_values": noise(3, 4 * FRAMES - 7, "motion_encoder_size", "motion_encoder_size"),
    },
    ("helios", "HeliosTransformer3DModel"): {
        **_VIDEO | _INDEXED,
        **_text("text_dim"),
        "indices_latents_history_long": frame_indices(1, 16),
        "indices_latents_history_mid": frame_indices(17, 2),
        "indices_latents_history_short": frame_indices(19, 1),
        "indices_hidden_states": frame_indices(20, FRAMES),
        "latents_history_long": noise("in_channels", 16, SIDE, SIDE),
        "latents_history_mid": noise("in_channels", 2, SIDE, SIDE),
        "latents_history_short": noise("in_channels", 1, SIDE, SIDE),
    },
    ("anyflow", "AnyFlowTransformer3DModel"): _ANYFLOW,
    ("anyflow-far", "AnyFlowFARTransformer3DModel"): {
        **_ANYFLOW,
        "chunk_partition": constant([1, 2, 2]),
    },
    ("hunyuan-video", "HunyuanVideoTransformer3DModel"): _HUNYUAN_VIDEO,
    ("hunyuan-video15", "HunyuanVideo15Transformer3DModel"): {
        **_VIDEO,
        **_HUNYUAN,
        "image_embeds": first_frame,
    },
    ("framepack", "HunyuanVideoFramepackTransformer3DModel"): {
        **_HUNYUAN_VIDEO,
        "image_embeds": noise(WORDS, "image_proj_dim"),
        "indices_latents": indices(FRAMES),
        "latents_clean": noise("in_channels", 2, SIDE, SIDE),
        "indices_latents_clean": indices(2),
        "latents_history_2x": noise("in_channels", 2, SIDE, SIDE),
        "indices_latents_history_2x": indices(2),
        "latents_history_4x": noise("in_channels", 16, SIDE, SIDE),
        "indices_latents_history_4x": indices(16),
    },
    ("cogvideox", "CogVideoXTransformer3DModel"): {
        **_COGVIDEO,
        "ofs": when("ofs_embed_dim", full(2)),
    },
    ("consisid", "ConsisIDTransformer3DModel"): {
        **_COGVIDEO,
        "id_cond": when("is_train_face", noise("LFE_id_dim")),
        "id_vit_hidden": when("is_train_face", list_of("LFE_num_scale", noise(577, "LFE_vit_dim"))),
    },
    ("mochi", "MochiTransformer3DModel"): {**_VIDEO, **_TEXT, **_MASK},
    ("ltx", "LTXVideoTransformer3DModel"): {**_LTX, **_CAPTION, **_MASK},
    ("ltx2", "LTX2VideoTransformer3DModel"): {
        **_LTX,
        "audio_hidden_states": noise(TOKENS, "audio_in_channels"),
        **_text(lambda c: c.caption_channels if c.use_prompt_embeddings else c.cross_attention_dim),
        "audio_encoder_hidden_states": noise(
            WORDS,
            lambda c: (
                c.caption_channels if c.use_prompt_embeddings else c.audio_cross_attention_dim
            ),
        ),
        "sigma": timestep,
        "audio_num_frames": constant(TOKENS),
    },
    ("latte", "LatteTransformer3DModel"): {
        **_latents("in_channels", "video_length", "sample_size", "sample_size", at=timestep_index),
        **_CAPTION,
    },
    ("allegro", "AllegroTransformer3DModel"): {**_VIDEO | _INDEXED, **_CAPTION},
    ("easyanimate", "EasyAnimateTransformer3DModel"): {
        **_latents(lambda c: c.out_channels or c.in_channels, FRAMES, SIDE, SIDE),
        **_TEXT,
        "encoder_hidden_states_t5": noise(WORDS, "text_embed_dim_t5"),
        "inpaint_latents": noise(
            lambda c: c.in_channels - (c.out_channels or c.in_channels) or None, FRAMES, SIDE, SIDE
        ),
    },
    ("sana-video", "SanaVideoTransformer3DModel"): {
        **_VIDEO,
        **_CAPTION,
        "guidance": guidance(0.45),
    },
    ("motif-video", "MotifVideoTransformer3DModel"): {**_VIDEO, **_TEXT},
    ("kandinsky5", "Kandinsky5Transformer3DModel"): {
        **_KANDINSKY,
        "visual_rope_pos": indices(FRAMES, SIDE, SIDE),
        "text_rope_pos": indices(WORDS),
    },
    ("kandinsky6", "Kandinsky6Transformer3DModel"): {
        **_KANDINSKY,
        "audio_hidden_states": noise(WORDS, "in_audio_dim"),
    },
    ("kandinsky6-sr", "Kandinsky6SRTransformer3DModel"): _latents(
        FRAMES, SIDE, SIDE, lambda c: 2 * c.in_visual_dim + 1
    ),
    ("sana-wm", "SanaWMTransformer3DModel"): {
        **_latents("in_channels", FRAMES, SIDE, SIDE, at=timestep_per(1, FRAMES)),
        "encoder_hidden_states": noise(1, WORDS, "caption_channels"),
        **_MASK,
    },
    ("sana-wm-refiner", "SanaWMLTX2RefinerTransformer3DModel"): {
        **_latents(TOKENS, "in_channels", at=timestep_per(TOKENS)),
        **_CAPTION,
        "video_rotary_emb": batched(
            rotary_embedding(TOKENS, lambda c: c.num_attention_heads * c.attention_head_dim)
        ),
    },
}
_UP_TO_1: dict[tuple[str, ...], dict[str, Maker]] = {
    # images
    ("flux", "FluxTransformer2DModel"): {**_FLUX, **_POOLED, "guidance": guidance(3.5)},
    ("flux2", "Flux2Transformer2DModel"): {**_JOINT, **_IDS_4, "guidance": guidance(4.0)},
    ("flux3", "Flux3Transformer2DModel"): {
        **_JOINT,
        **_IDS_4,
        "image_cond_hidden_states": noise(TOKENS, "cond_in_channels"),
        "image_cond_ids": image_ids(4),
        "target_timestep": when("flow_map", timestep),
    },
    ("chroma", "ChromaTransformer2DModel", "OvisImageTransformer2DModel"): _FLUX,
    ("longcat-image", "LongCatImageTransformer2DModel"): _FLUX | {"txt_ids": text_ids(1, 2, of=3)},
    ("qwen-image", "QwenImageTransformer2DModel"): {
        **_JOINT,
        "img_shapes": image_shapes,
        "guidance": guidance(1.0),
    },
    ("qwen-image-21", "QwenImage21Transformer2DModel"): {
        **_PACKED,
        **_text("context_in_dim"),
        "img_shapes": image_shapes,
        "img_mask": batched(lambda forward: torch.arange(WORDS + TOKENS // 4) >= WORDS),
    },
    ("lumina2", "Lumina2Transformer2DModel"): {**_SQUARE, **_text("cap_feat_dim"), **_MASK},
    ("lumina-next", "LuminaNextDiT2DModel"): {
        **_SQUARE,
        **_text("cross_attention_dim"),
        "encoder_mask": full(1, WORDS),
        "image_rotary_emb": lumina_rotary_embedding,
        "cross_attention_kwargs": constant({}),
    },
    ("aura-flow", "AuraFlowTransformer2DModel"): {**_SQUARE, **_text("joint_attention_dim")},
    ("z-image", "ZImageTransformer2DModel"): {
        "x": per_image(noise("in_channels", 1, 32, 32)),
        "t": timestep,
        "cap_feats": per_image(noise(WORDS, "cap_feat_dim")),
    },
    ("omnigen", "OmniGenTransformer2DModel"): {
        **_IMAGE,
        "input_ids": random_ids("vocab_size", WORDS),
        "input_img_latents": constant([]),
        "input_image_sizes": constant({}),
        "attention_mask": full(1, WORDS + 1 + TOKENS, WORDS + 1 + TOKENS),
        "position_ids": frame_indices(0, WORDS + 1 + TOKENS),
    },
    ("krea2", "Krea2Transformer2DModel"): {
        **_PACKED,
        **_text("num_text_layers", "text_hidden_dim"),
        "position_ids": image_ids(3, WORDS),
    },
    ("prx", "PRXTransformer2DModel"): {**_IMAGE, **_text("context_in_dim")},
    ("ideogram4", "Ideogram4Transformer2DModel"): {
        **_latents(WORDS + TOKENS, "in_channels"),
        "encoder_hidden_states": noise(WORDS + TOKENS, "llm_features_dim"),
        "position_ids": batched(image_ids(3, WORDS)),
        "segment_ids": full(1, WORDS + TOKENS, dtype=torch.long),
        # 3 for tokens of text, 2 for tokens of the image
        "indicator": batched(lambda forward: torch.tensor([3] * WORDS + [2] * TOKENS)),
    },
    ("bria-fibo2", "BriaFibo2Transformer2DModel"): {
        **_IMAGE,
        "encoder_hidden_states": noise(
            lambda c: 1 + len(c.injection_layer_ids), WORDS, "cap_feat_dim"
        ),
    },
    # videos
    ("cosmos", "CosmosTransformer3DModel"): {
        **_latents("in_channels", lambda c: min(FRAMES, c.max_size[0]), SIDE, SIDE),
        "encoder_hidden_states": cosmos_condition,
        "fps": constant(24),
        "padding_mask": when("concat_padding_mask", constant(torch.zeros(1, 1, 128, 128))),
    },
    # audio
    ("stable-audio", "StableAudioDiTModel"): {
        **_AUDIO,
        **_text("cross_attention_input_dim"),
        "global_hidden_states": noise(1, "global_states_input_dim"),
        "rotary_embedding": rotary_embedding(TOKENS + 1, lambda c: c.attention_head_dim // 2),
    },
    ("stable-audio3", "StableAudio3DiTModel"): {
        **_latents("io_channels", TOKENS),
        **_text("cond_token_dim"),
        "global_hidden_states": noise("global_cond_dim"),
    },
    ("ace-step", "AceStepTransformer1DModel"): {
        **_latents(TOKENS, "audio_acoustic_hidden_dim"),
        "timestep_r": timestep,
        **_text(lambda c: c.get("encoder_hidden_size") or c.hidden_size),
        "context_latents": noise(TOKENS, lambda c: c.in_channels - c.audio_acoustic_hidden_dim),
    },
    ("longcat-audio", "LongCatAudioDiTTransformer"): {
        **_latents(TOKENS, "latent_dim"),
        **_text("dit_text_dim"),
        "attention_mask": mask(TOKENS),
        "latent_cond": noise(TOKENS, "latent_dim"),
        **_MASK,
    },
    ("minimax-music3", "MiniMaxMusic3Transformer1DModel"): {
        **_AUDIO,
        "encoder_hidden_states": noise(TOKENS, "condition_dim"),
    },
}

FAMILIES = (
    *_families(_UP_TO_1000, 1000.0),
    *_families(_UP_TO_1, 1.0),
    *_families(unets.UP_TO_1000, 1000.0),
    *_families(unets.UP_TO_1, 1.0),
    *_families(unets.UP_TO_LOG_SIGMA, 1.64),  # a quarter of log 700, the largest noise level
    Family(
        "nucleus",
        ("NucleusMoEImageTransformer2DModel",),
        arguments(**_JOINT, img_shapes=image_shapes),
        # each block embeds the text; by its shape encoder_proj would be a feed-forward
        roles=((r"\.encoder_proj$", "embed"),),
        largest_timestep=1.0,
    ),
)
