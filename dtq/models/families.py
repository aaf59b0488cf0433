# SPDX-License-Identifier: Apache-2.0
"""``FAMILIES``: one row per family of transformers for images, videos or audio.

Timesteps go up to 1 if the pipeline divides the scheduler's timesteps by 1000, or if its scheduler
counts from 0 to 1; otherwise up to 1000. In a pipeline with reversed time, the largest
timestep is that of the clean image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dtq.models.base import Family
from dtq.models.dummy_inputs import (
    FRAMES,
    SIDE,
    TOKENS,
    WORDS,
    Maker,
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
    text_then_image,
    timestep,
    timestep_index,
    timestep_per,
    when,
)


def _family_1000(name: str, *classes: str, **makers: Maker) -> Family:
    """A family whose timesteps go up to 1000; ``makers`` make the arguments of a forward."""
    return Family(name, classes, arguments(**makers))


def _family_1(name: str, *classes: str, **makers: Maker) -> Family:
    """A family whose timesteps go up to 1; ``makers`` make the arguments of a forward."""
    return Family(name, classes, arguments(**makers), largest_timestep=1.0)


def _patch(axis: int) -> Callable[[Any], int]:
    return lambda config: config.patch_size[axis]  # type: ignore[no-any-return]


def _cogvideo_tokens(config: Any) -> int:
    """Tokens of four latent frames."""
    frame = config.sample_height * config.sample_width // config.patch_size**2
    return int(frame * 4 // (config.get("patch_size_t") or 1))


# arguments that several families have in common
_SQUARE = {
    "hidden_states": noise("in_channels", "sample_size", "sample_size"),
    "timestep": timestep,
}
_IMAGE = {"hidden_states": noise("in_channels", 32, 32), "timestep": timestep}
_VIDEO = {"hidden_states": noise("in_channels", FRAMES, SIDE, SIDE), "timestep": timestep}
_INDEXED_VIDEO = _VIDEO | {"timestep": timestep_index}
_PACKED = {"hidden_states": noise(TOKENS, "in_channels"), "timestep": timestep}
_AUDIO = {"hidden_states": noise("in_channels", TOKENS), "timestep": timestep}
_JOINT = {"encoder_hidden_states": noise(WORDS, "joint_attention_dim")}
_CAPTION = {"encoder_hidden_states": noise(WORDS, "caption_channels")}
_TEXT = {"encoder_hidden_states": noise(WORDS, "text_embed_dim")}
_CONTEXT = {"encoder_hidden_states": noise(WORDS, "context_in_dim")}
_UMT5 = {"encoder_hidden_states": noise(WORDS, "text_dim")}
_MASK = {"encoder_attention_mask": mask(WORDS)}
_POOLED = {"pooled_projections": noise("pooled_projection_dim")}
_IDS = {"img_ids": image_ids(3), "txt_ids": text_ids(of=3)}
_IDS_4 = {"img_ids": image_ids(4), "txt_ids": text_ids(3, of=4)}
_CROP = {"target_size": full(1024, 2), "crop_coords": full(0, 2)}
_FLUX = {**_PACKED, **_JOINT, **_IDS}
_HUNYUAN = {
    **_TEXT,
    **_MASK,
    "encoder_hidden_states_2": noise(WORDS, "text_embed_2_dim"),
    "encoder_attention_mask_2": mask(WORDS),
    "timestep_r": when("use_meanflow", timestep),
}
_HUNYUAN_VIDEO = {**_VIDEO, **_TEXT, **_MASK, **_POOLED, "guidance": guidance(6000.0)}
_WAN = {
    **_INDEXED_VIDEO,
    **_UMT5,
    "encoder_hidden_states_image": noise(257, "image_dim"),
}
_ANYFLOW = {
    **_UMT5,
    "hidden_states": noise(FRAMES, "in_channels", SIDE, SIDE),
    "timestep": timestep_per(FRAMES),
    "r_timestep": timestep_per(FRAMES),
}
_LTX = {
    "hidden_states": noise(FRAMES * TOKENS, "in_channels"),
    "timestep": timestep,
    "num_frames": constant(FRAMES),
    "height": constant(SIDE),
    "width": constant(SIDE),
}
_COGVIDEO = {
    # four frames, since a patch of CogVideoX 1.5 has two
    "hidden_states": noise(4, "in_channels", "sample_height", "sample_width"),
    "timestep": timestep_index,
    "encoder_hidden_states": noise("max_text_seq_length", "text_embed_dim"),
    "image_rotary_emb": when(
        "use_rotary_positional_embeddings", rotary_embedding(_cogvideo_tokens, "attention_head_dim")
    ),
}
_KANDINSKY = {
    # channels: the latents, then those of the first frame and a mask of where they are valid
    "hidden_states": noise(
        FRAMES, 2 * SIDE, 2 * SIDE, lambda c: c.in_visual_dim * (1 + c.visual_cond) + c.visual_cond
    ),
    "timestep": timestep,
    "encoder_hidden_states": noise(WORDS, "in_text_dim"),
    "pooled_projections": noise("in_text_dim2"),
}

FAMILIES: tuple[Family, ...] = (
    # images
    _family_1000(
        "dit",
        "DiTTransformer2DModel",
        **_SQUARE | {"timestep": timestep_index, "class_labels": labels},
    ),
    _family_1000(
        "pixart",
        "PixArtTransformer2DModel",
        **_SQUARE | {"timestep": timestep_index},
        encoder_hidden_states=noise(
            WORDS, lambda c: c.get("caption_channels") or c.cross_attention_dim
        ),
        added_cond_kwargs=resolution,
    ),
    _family_1000("sd3", "SD3Transformer2DModel", **_SQUARE, **_JOINT, **_POOLED),
    _family_1("flux", "FluxTransformer2DModel", **_FLUX, **_POOLED, guidance=guidance(3.5)),
    _family_1(
        "flux2", "Flux2Transformer2DModel", **_PACKED, **_JOINT, **_IDS_4, guidance=guidance(4.0)
    ),
    _family_1("chroma", "ChromaTransformer2DModel", "OvisImageTransformer2DModel", **_FLUX),
    _family_1(
        "longcat-image",
        "LongCatImageTransformer2DModel",
        **_PACKED,
        **_JOINT,
        img_ids=image_ids(3),
        txt_ids=text_ids(1, 2, of=3),
    ),
    _family_1000("bria", "BriaTransformer2DModel", **_FLUX),
    _family_1000(
        "bria-fibo",
        "BriaFiboTransformer2DModel",
        **_FLUX,
        text_encoder_layers=list_of(
            lambda c: c.num_layers + c.num_single_layers, noise(WORDS, "text_encoder_dim")
        ),
    ),
    _family_1(
        "qwen-image",
        "QwenImageTransformer2DModel",
        **_PACKED,
        **_JOINT,
        img_shapes=image_shapes,
        guidance=guidance(1.0),
    ),
    # each block embeds the text; by its shape encoder_proj would be a feed-forward
    replace(
        _family_1(
            "nucleus",
            "NucleusMoEImageTransformer2DModel",
            **_PACKED,
            **_JOINT,
            img_shapes=image_shapes,
        ),
        roles=((r"\.encoder_proj$", "embed"),),
    ),
    _family_1000("sana", "SanaTransformer2DModel", **_SQUARE, **_CAPTION, guidance=guidance(0.45)),
    _family_1(
        "lumina2",
        "Lumina2Transformer2DModel",
        **_SQUARE,
        encoder_hidden_states=noise(WORDS, "cap_feat_dim"),
        **_MASK,
    ),
    _family_1("aura-flow", "AuraFlowTransformer2DModel", **_SQUARE, **_JOINT),
    _family_1000(
        "cogview",
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        **_SQUARE,
        **_TEXT,
        **_CROP,
        original_size=full(1024, 2),
    ),
    _family_1(
        "z-image",
        "ZImageTransformer2DModel",
        x=per_image(noise("in_channels", 1, 32, 32)),
        t=timestep,
        cap_feats=per_image(noise(WORDS, "cap_feat_dim")),
    ),
    _family_1000(
        "hidream",
        "HiDreamImageTransformer2DModel",
        hidden_states=noise("in_channels", 32, 32),
        timesteps=timestep,
        encoder_hidden_states_t5=noise(WORDS, lambda c: c.caption_channels[0]),
        encoder_hidden_states_llama3=list_of(
            lambda c: max(c.llama_layers) + 1, noise(WORDS, lambda c: c.caption_channels[1])
        ),
        pooled_embeds=noise("text_emb_dim"),
    ),
    _family_1000(
        "hunyuan-dit",
        "HunyuanDiT2DModel",
        **_SQUARE,
        encoder_hidden_states=noise("text_len", "cross_attention_dim"),
        text_embedding_mask=mask("text_len"),
        encoder_hidden_states_t5=noise("text_len_t5", "cross_attention_dim_t5"),
        text_embedding_mask_t5=mask("text_len_t5"),
        image_meta_size=full(1024, 6),
        style=full(0, dtype=torch.long),
        image_rotary_emb=rotary_embedding(
            lambda c: (c.sample_size // c.patch_size) ** 2, "attention_head_dim"
        ),
    ),
    _family_1000(
        "hunyuan-image",
        "HunyuanImageTransformer2DModel",
        **_IMAGE,
        **_HUNYUAN,
        guidance=guidance(3500.0),
    ),
    _family_1(
        "lumina-next",
        "LuminaNextDiT2DModel",
        **_SQUARE,
        encoder_hidden_states=noise(WORDS, "cross_attention_dim"),
        encoder_mask=full(1, WORDS),
        image_rotary_emb=lumina_rotary_embedding,
        cross_attention_kwargs=constant({}),
    ),
    _family_1000(
        "glm-image",
        "GlmImageTransformer2DModel",
        **_IMAGE,
        **_TEXT,
        prior_token_id=random_ids("prior_vq_quantizer_codebook_size", TOKENS),
        prior_token_drop=full(False, TOKENS, dtype=torch.bool),
        **_CROP,
    ),
    _family_1(
        "omnigen",
        "OmniGenTransformer2DModel",
        **_IMAGE,
        input_ids=random_ids("vocab_size", WORDS),
        input_img_latents=constant([]),
        input_image_sizes=constant({}),
        attention_mask=full(1, WORDS + 1 + TOKENS, WORDS + 1 + TOKENS),
        position_ids=frame_indices(0, WORDS + 1 + TOKENS),
    ),
    _family_1(
        "krea2",
        "Krea2Transformer2DModel",
        **_PACKED,
        encoder_hidden_states=noise(WORDS, "num_text_layers", "text_hidden_dim"),
        position_ids=image_ids(3, WORDS),
    ),
    _family_1000(
        "ernie-image",
        "ErnieImageTransformer2DModel",
        **_IMAGE,
        text_bth=noise(WORDS, "text_in_dim"),
        text_lens=full(WORDS, dtype=torch.long),
    ),
    _family_1("prx", "PRXTransformer2DModel", **_IMAGE, **_CONTEXT),
    _family_1(
        "ideogram4",
        "Ideogram4Transformer2DModel",
        hidden_states=noise(WORDS + TOKENS, "in_channels"),
        timestep=timestep,
        encoder_hidden_states=noise(WORDS + TOKENS, "llm_features_dim"),
        position_ids=batched(image_ids(3, WORDS)),
        segment_ids=full(1, WORDS + TOKENS, dtype=torch.long),
        indicator=text_then_image(3, 2),
    ),
    _family_1000(
        "joyimage",
        "JoyImageEditTransformer3DModel",
        hidden_states=noise("in_channels", 1, 32, 32),
        timestep=timestep,
        **_UMT5,
    ),
    _family_1000(
        "joyimage-plus",
        "JoyImageEditPlusTransformer3DModel",
        hidden_states=noise(TOKENS, "in_channels", *map(_patch, range(3))),
        timestep=timestep,
        shape_list=image_shapes,
        **_UMT5,
    ),
    _family_1(
        "flux3",
        "Flux3Transformer2DModel",
        **_PACKED,
        **_JOINT,
        **_IDS_4,
        image_cond_hidden_states=noise(TOKENS, "cond_in_channels"),
        image_cond_ids=image_ids(4),
        target_timestep=when("flow_map", timestep),
    ),
    _family_1(
        "bria-fibo2",
        "BriaFibo2Transformer2DModel",
        **_IMAGE,
        encoder_hidden_states=noise(
            lambda c: 1 + len(c.injection_layer_ids), WORDS, "cap_feat_dim"
        ),
    ),
    _family_1(
        "qwen-image-21",
        "QwenImage21Transformer2DModel",
        **_PACKED,
        **_CONTEXT,
        img_shapes=image_shapes,
        img_mask=batched(lambda forward: torch.arange(WORDS + TOKENS // 4) >= WORDS),
    ),
    _family_1000(
        "prior",
        "PriorTransformer",
        hidden_states=noise("embedding_dim"),
        timestep=timestep_index,
        proj_embedding=noise(lambda c: c.embedding_proj_dim or c.embedding_dim),
        encoder_hidden_states=when(
            "encoder_hid_proj_type", noise("num_embeddings", "embedding_dim")
        ),
    ),
    # videos
    _family_1000(
        "wan",
        "WanTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
        **_WAN,
    ),
    _family_1000("hunyuan-video", "HunyuanVideoTransformer3DModel", **_HUNYUAN_VIDEO),
    _family_1000(
        "wan-vace",
        "WanVACETransformer3DModel",
        **_WAN,
        control_hidden_states=noise("vace_in_channels", FRAMES, SIDE, SIDE),
    ),
    _family_1000(
        "wan-animate",
        "WanAnimateTransformer3DModel",
        **_WAN,
        pose_hidden_states=noise("latent_channels", FRAMES - 1, SIDE, SIDE),
        face_pixel_values=noise(3, 4 * FRAMES - 7, "motion_encoder_size", "motion_encoder_size"),
    ),
    _family_1000(
        "helios",
        "HeliosTransformer3DModel",
        **_INDEXED_VIDEO,
        **_UMT5,
        indices_latents_history_long=frame_indices(1, 16),
        indices_latents_history_mid=frame_indices(17, 2),
        indices_latents_history_short=frame_indices(19, 1),
        indices_hidden_states=frame_indices(20, FRAMES),
        latents_history_long=noise("in_channels", 16, SIDE, SIDE),
        latents_history_mid=noise("in_channels", 2, SIDE, SIDE),
        latents_history_short=noise("in_channels", 1, SIDE, SIDE),
    ),
    _family_1000("anyflow", "AnyFlowTransformer3DModel", **_ANYFLOW),
    _family_1000(
        "anyflow-far",
        "AnyFlowFARTransformer3DModel",
        **_ANYFLOW,
        chunk_partition=constant([1, 2, 2]),
    ),
    _family_1000(
        "hunyuan-video15",
        "HunyuanVideo15Transformer3DModel",
        **_VIDEO,
        **_HUNYUAN,
        image_embeds=first_frame,
    ),
    _family_1000(
        "framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        **_HUNYUAN_VIDEO,
        image_embeds=noise(WORDS, "image_proj_dim"),
        indices_latents=indices(FRAMES),
        latents_clean=noise("in_channels", 2, SIDE, SIDE),
        indices_latents_clean=indices(2),
        latents_history_2x=noise("in_channels", 2, SIDE, SIDE),
        indices_latents_history_2x=indices(2),
        latents_history_4x=noise("in_channels", 16, SIDE, SIDE),
        indices_latents_history_4x=indices(16),
    ),
    _family_1000(
        "cogvideox", "CogVideoXTransformer3DModel", **_COGVIDEO, ofs=when("ofs_embed_dim", full(2))
    ),
    _family_1000(
        "consisid",
        "ConsisIDTransformer3DModel",
        **_COGVIDEO,
        id_cond=when("is_train_face", noise("LFE_id_dim")),
        id_vit_hidden=when("is_train_face", list_of("LFE_num_scale", noise(577, "LFE_vit_dim"))),
    ),
    _family_1000("mochi", "MochiTransformer3DModel", **_VIDEO, **_TEXT, **_MASK),
    _family_1000("ltx", "LTXVideoTransformer3DModel", **_LTX, **_CAPTION, **_MASK),
    _family_1000(
        "ltx2",
        "LTX2VideoTransformer3DModel",
        **_LTX,
        audio_hidden_states=noise(TOKENS, "audio_in_channels"),
        encoder_hidden_states=noise(
            WORDS,
            lambda c: c.caption_channels if c.use_prompt_embeddings else c.cross_attention_dim,
        ),
        audio_encoder_hidden_states=noise(
            WORDS,
            lambda c: (
                c.caption_channels if c.use_prompt_embeddings else c.audio_cross_attention_dim
            ),
        ),
        sigma=timestep,
        audio_num_frames=constant(TOKENS),
    ),
    _family_1000(
        "latte",
        "LatteTransformer3DModel",
        hidden_states=noise("in_channels", "video_length", "sample_size", "sample_size"),
        timestep=timestep_index,
        **_CAPTION,
    ),
    _family_1000("allegro", "AllegroTransformer3DModel", **_INDEXED_VIDEO, **_CAPTION),
    _family_1000(
        "easyanimate",
        "EasyAnimateTransformer3DModel",
        hidden_states=noise(lambda c: c.out_channels or c.in_channels, FRAMES, SIDE, SIDE),
        timestep=timestep,
        **_TEXT,
        encoder_hidden_states_t5=noise(WORDS, "text_embed_dim_t5"),
        inpaint_latents=noise(
            lambda c: c.in_channels - (c.out_channels or c.in_channels) or None, FRAMES, SIDE, SIDE
        ),
    ),
    _family_1(
        "cosmos",
        "CosmosTransformer3DModel",
        hidden_states=noise("in_channels", lambda c: min(FRAMES, c.max_size[0]), SIDE, SIDE),
        timestep=timestep,
        encoder_hidden_states=cosmos_condition,
        fps=constant(24),
        padding_mask=when("concat_padding_mask", constant(torch.zeros(1, 1, 128, 128))),
    ),
    _family_1000(
        "sana-video", "SanaVideoTransformer3DModel", **_VIDEO, **_CAPTION, guidance=guidance(0.45)
    ),
    _family_1000("motif-video", "MotifVideoTransformer3DModel", **_VIDEO, **_TEXT),
    _family_1000(
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        **_KANDINSKY,
        visual_rope_pos=indices(FRAMES, SIDE, SIDE),
        text_rope_pos=indices(WORDS),
    ),
    _family_1000(
        "kandinsky6",
        "Kandinsky6Transformer3DModel",
        **_KANDINSKY,
        audio_hidden_states=noise(WORDS, "in_audio_dim"),
    ),
    _family_1000(
        "kandinsky6-sr",
        "Kandinsky6SRTransformer3DModel",
        hidden_states=noise(FRAMES, SIDE, SIDE, lambda c: 2 * c.in_visual_dim + 1),
        timestep=timestep,
    ),
    _family_1000(
        "sana-wm",
        "SanaWMTransformer3DModel",
        **_VIDEO | {"timestep": timestep_per(1, FRAMES)},
        encoder_hidden_states=noise(1, WORDS, "caption_channels"),
        **_MASK,
    ),
    _family_1000(
        "sana-wm-refiner",
        "SanaWMLTX2RefinerTransformer3DModel",
        **_PACKED | {"timestep": timestep_per(TOKENS)},
        **_CAPTION,
        video_rotary_emb=batched(
            rotary_embedding(TOKENS, lambda c: c.num_attention_heads * c.attention_head_dim)
        ),
    ),
    # audio
    _family_1(
        "stable-audio",
        "StableAudioDiTModel",
        **_AUDIO,
        encoder_hidden_states=noise(WORDS, "cross_attention_input_dim"),
        global_hidden_states=noise(1, "global_states_input_dim"),
        rotary_embedding=rotary_embedding(TOKENS + 1, lambda c: c.attention_head_dim // 2),
    ),
    _family_1(
        "stable-audio3",
        "StableAudio3DiTModel",
        hidden_states=noise("io_channels", TOKENS),
        timestep=timestep,
        encoder_hidden_states=noise(WORDS, "cond_token_dim"),
        global_hidden_states=noise("global_cond_dim"),
    ),
    _family_1(
        "ace-step",
        "AceStepTransformer1DModel",
        hidden_states=noise(TOKENS, "audio_acoustic_hidden_dim"),
        timestep=timestep,
        timestep_r=timestep,
        encoder_hidden_states=noise(WORDS, lambda c: c.get("encoder_hidden_size") or c.hidden_size),
        context_latents=noise(TOKENS, lambda c: c.in_channels - c.audio_acoustic_hidden_dim),
    ),
    _family_1(
        "longcat-audio",
        "LongCatAudioDiTTransformer",
        hidden_states=noise(TOKENS, "latent_dim"),
        timestep=timestep,
        encoder_hidden_states=noise(WORDS, "dit_text_dim"),
        attention_mask=mask(TOKENS),
        latent_cond=noise(TOKENS, "latent_dim"),
        **_MASK,
    ),
    _family_1(
        "minimax-music3",
        "MiniMaxMusic3Transformer1DModel",
        **_AUDIO,
        encoder_hidden_states=noise(TOKENS, "condition_dim"),
    ),
)
