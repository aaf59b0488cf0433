# SPDX-License-Identifier: Apache-2.0
"""``FAMILIES``: the models that dtq knows by name, a row each: pictures, videos, sounds.

``largest_timestep`` is 1 where the pipeline divides the scheduler's timesteps by 1000, or its
scheduler counts from 0 to 1. Where a pipeline num_rotations time around, the largest is the clean picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dtq.models.base import Family
from dtq.models.dummy_inputs import (
    FRAMES,
    SIDE,
    TOKENS,
    WORDS,
    arguments,
    batched,
    constant,
    cosmos_condition,
    draws,
    each,
    first_frame,
    frames,
    full,
    grid,
    guidance,
    labels,
    line,
    listed,
    lumina_rotation,
    mask,
    noise,
    numbers,
    picture_shapes,
    resolution,
    rotation,
    step,
    time,
    time_of_each,
    when,
    words_then_picture,
)


def _patch(axis: int) -> Callable[[Any], int]:
    return lambda config: config.patch_size[axis]  # type: ignore[no-any-return]


def _cogvideo_tokens(config: Any) -> int:
    """Of four frames."""
    frame = config.sample_height * config.sample_width // config.patch_size**2
    return int(frame * 4 // (config.get("patch_size_t") or 1))


# what many families have in common; a row may have it otherwise
_SQUARE = {"hidden_states": noise("in_channels", "sample_size", "sample_size"), "timestep": time}
_PICTURE = {"hidden_states": noise("in_channels", 32, 32), "timestep": time}
_VIDEO = {"hidden_states": noise("in_channels", FRAMES, SIDE, SIDE), "timestep": time}
_STEPPED_VIDEO = _VIDEO | {"timestep": step}
_PACKED = {"hidden_states": noise(TOKENS, "in_channels"), "timestep": time}
_SOUND = {"hidden_states": noise("in_channels", TOKENS), "timestep": time}
_JOINT = {"encoder_hidden_states": noise(WORDS, "joint_attention_dim")}
_CAPTION = {"encoder_hidden_states": noise(WORDS, "caption_channels")}
_TEXT = {"encoder_hidden_states": noise(WORDS, "text_embed_dim")}
_CONTEXT = {"encoder_hidden_states": noise(WORDS, "context_in_dim")}
_UMT5 = {"encoder_hidden_states": noise(WORDS, "text_dim")}
_MASK = {"encoder_attention_mask": mask(WORDS)}
_POOLED = {"pooled_projections": noise("pooled_projection_dim")}
_IDS = {"img_ids": grid(3), "txt_ids": line(of=3)}
_IDS_4 = {"img_ids": grid(4), "txt_ids": line(3, of=4)}
_CROP = {"target_size": full(1024, 2), "crop_coords": full(0, 2)}
_FLUX = {**_PACKED, **_JOINT, **_IDS}
_HUNYUAN = {
    **_TEXT,
    **_MASK,
    "encoder_hidden_states_2": noise(WORDS, "text_embed_2_dim"),
    "encoder_attention_mask_2": mask(WORDS),
    "timestep_r": when("use_meanflow", time),
}
_HUNYUAN_VIDEO = {**_VIDEO, **_TEXT, **_MASK, **_POOLED, "guidance": guidance(6000.0)}
_WAN = {
    **_STEPPED_VIDEO,
    **_UMT5,
    "encoder_hidden_states_image": noise(257, "image_dim"),
}
_ANYFLOW = {
    **_UMT5,
    "hidden_states": noise(FRAMES, "in_channels", SIDE, SIDE),
    "timestep": time_of_each(FRAMES),
    "r_timestep": time_of_each(FRAMES),
}
_LTX = {
    "hidden_states": noise(FRAMES * TOKENS, "in_channels"),
    "timestep": time,
    "num_frames": constant(FRAMES),
    "height": constant(SIDE),
    "width": constant(SIDE),
}
_COGVIDEO = {
    # four frames: CogVideoX 1.5 has two in a patch
    "hidden_states": noise(4, "in_channels", "sample_height", "sample_width"),
    "timestep": step,
    "encoder_hidden_states": noise("max_text_seq_length", "text_embed_dim"),
    "image_rotary_emb": when(
        "use_rotary_positional_embeddings", rotation(_cogvideo_tokens, "attention_head_dim")
    ),
}
_KANDINSKY = {
    # behind the latents those of the first frame, and where they are valid
    "hidden_states": noise(
        FRAMES, 2 * SIDE, 2 * SIDE, lambda c: c.in_visual_dim * (1 + c.visual_cond) + c.visual_cond
    ),
    "timestep": time,
    "encoder_hidden_states": noise(WORDS, "in_text_dim"),
    "pooled_projections": noise("in_text_dim2"),
}

FAMILIES: tuple[Family, ...] = (
    # pictures
    Family(
        "dit",
        ("DiTTransformer2DModel",),
        arguments(**_SQUARE | {"timestep": step, "class_labels": labels}),
    ),
    Family(
        "pixart",
        ("PixArtTransformer2DModel",),
        arguments(
            **_SQUARE | {"timestep": step},
            encoder_hidden_states=noise(
                WORDS, lambda c: c.get("caption_channels") or c.cross_attention_dim
            ),
            added_cond_kwargs=resolution,
        ),
    ),
    Family("sd3", ("SD3Transformer2DModel",), arguments(**_SQUARE, **_JOINT, **_POOLED)),
    Family(
        "flux",
        ("FluxTransformer2DModel",),
        arguments(**_FLUX, **_POOLED, guidance=guidance(3.5)),
        largest_timestep=1.0,
    ),
    Family(
        "flux2",
        ("Flux2Transformer2DModel",),
        arguments(**_PACKED, **_JOINT, **_IDS_4, guidance=guidance(4.0)),
        largest_timestep=1.0,
    ),
    Family(
        "chroma",
        ("ChromaTransformer2DModel", "OvisImageTransformer2DModel"),
        arguments(**_FLUX),
        largest_timestep=1.0,
    ),
    Family(
        "longcat-image",
        ("LongCatImageTransformer2DModel",),
        arguments(**_PACKED, **_JOINT, img_ids=grid(3), txt_ids=line(1, 2, of=3)),
        largest_timestep=1.0,
    ),
    Family("bria", ("BriaTransformer2DModel",), arguments(**_FLUX)),
    Family(
        "bria-fibo",
        ("BriaFiboTransformer2DModel",),
        arguments(
            **_FLUX,
            text_encoder_layers=listed(
                lambda c: c.num_layers + c.num_single_layers, noise(WORDS, "text_encoder_dim")
            ),
        ),
    ),
    Family(
        "qwen-image",
        ("QwenImageTransformer2DModel",),
        arguments(**_PACKED, **_JOINT, img_shapes=picture_shapes, guidance=guidance(1.0)),
        largest_timestep=1.0,
    ),
    Family(
        "nucleus",
        ("NucleusMoEImageTransformer2DModel",),
        arguments(**_PACKED, **_JOINT, img_shapes=picture_shapes),
        # each block embeds the text anew; by shape it would be a feed-forward
        roles=((r"\.encoder_proj$", "embed"),),
        largest_timestep=1.0,
    ),
    Family(
        "sana",
        ("SanaTransformer2DModel",),
        arguments(**_SQUARE, **_CAPTION, guidance=guidance(0.45)),
    ),
    Family(
        "lumina2",
        ("Lumina2Transformer2DModel",),
        arguments(**_SQUARE, encoder_hidden_states=noise(WORDS, "cap_feat_dim"), **_MASK),
        largest_timestep=1.0,
    ),
    Family(
        "aura-flow",
        ("AuraFlowTransformer2DModel",),
        arguments(**_SQUARE, **_JOINT),
        largest_timestep=1.0,
    ),
    Family(
        "cogview",
        ("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
        arguments(**_SQUARE, **_TEXT, **_CROP, original_size=full(1024, 2)),
    ),
    Family(
        "z-image",
        ("ZImageTransformer2DModel",),
        arguments(
            x=each(noise("in_channels", 1, 32, 32)),
            t=time,
            cap_feats=each(noise(WORDS, "cap_feat_dim")),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "hidream",
        ("HiDreamImageTransformer2DModel",),
        arguments(
            hidden_states=noise("in_channels", 32, 32),
            timesteps=time,
            encoder_hidden_states_t5=noise(WORDS, lambda c: c.caption_channels[0]),
            encoder_hidden_states_llama3=listed(
                lambda c: max(c.llama_layers) + 1, noise(WORDS, lambda c: c.caption_channels[1])
            ),
            pooled_embeds=noise("text_emb_dim"),
        ),
    ),
    Family(
        "hunyuan-dit",
        ("HunyuanDiT2DModel",),
        arguments(
            **_SQUARE,
            encoder_hidden_states=noise("text_len", "cross_attention_dim"),
            text_embedding_mask=mask("text_len"),
            encoder_hidden_states_t5=noise("text_len_t5", "cross_attention_dim_t5"),
            text_embedding_mask_t5=mask("text_len_t5"),
            image_meta_size=full(1024, 6),
            style=full(0, dtype=torch.long),
            image_rotary_emb=rotation(
                lambda c: (c.sample_size // c.patch_size) ** 2, "attention_head_dim"
            ),
        ),
    ),
    Family(
        "hunyuan-image",
        ("HunyuanImageTransformer2DModel",),
        arguments(**_PICTURE, **_HUNYUAN, guidance=guidance(3500.0)),
    ),
    Family(
        "lumina-next",
        ("LuminaNextDiT2DModel",),
        arguments(
            **_SQUARE,
            encoder_hidden_states=noise(WORDS, "cross_attention_dim"),
            encoder_mask=full(1, WORDS),
            image_rotary_emb=lumina_rotation,
            cross_attention_kwargs=constant({}),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "glm-image",
        ("GlmImageTransformer2DModel",),
        arguments(
            **_PICTURE,
            **_TEXT,
            prior_token_id=draws("prior_vq_quantizer_codebook_size", TOKENS),
            prior_token_drop=full(False, TOKENS, dtype=torch.bool),
            **_CROP,
        ),
    ),
    Family(
        "omnigen",
        ("OmniGenTransformer2DModel",),
        arguments(
            **_PICTURE,
            input_ids=draws("vocab_size", WORDS),
            input_img_latents=constant([]),
            input_image_sizes=constant({}),
            attention_mask=full(1, WORDS + 1 + TOKENS, WORDS + 1 + TOKENS),
            position_ids=frames(0, WORDS + 1 + TOKENS),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "krea2",
        ("Krea2Transformer2DModel",),
        arguments(
            **_PACKED,
            encoder_hidden_states=noise(WORDS, "num_text_layers", "text_hidden_dim"),
            position_ids=grid(3, WORDS),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "ernie-image",
        ("ErnieImageTransformer2DModel",),
        arguments(
            **_PICTURE,
            text_bth=noise(WORDS, "text_in_dim"),
            text_lens=full(WORDS, dtype=torch.long),
        ),
    ),
    Family(
        "prx",
        ("PRXTransformer2DModel",),
        arguments(**_PICTURE, **_CONTEXT),
        largest_timestep=1.0,
    ),
    Family(
        "ideogram4",
        ("Ideogram4Transformer2DModel",),
        arguments(
            hidden_states=noise(WORDS + TOKENS, "in_channels"),
            timestep=time,
            encoder_hidden_states=noise(WORDS + TOKENS, "llm_features_dim"),
            position_ids=batched(grid(3, WORDS)),
            segment_ids=full(1, WORDS + TOKENS, dtype=torch.long),
            indicator=words_then_picture(3, 2),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "joyimage",
        ("JoyImageEditTransformer3DModel",),
        arguments(hidden_states=noise("in_channels", 1, 32, 32), timestep=time, **_UMT5),
    ),
    Family(
        "joyimage-plus",
        ("JoyImageEditPlusTransformer3DModel",),
        arguments(
            hidden_states=noise(TOKENS, "in_channels", *map(_patch, range(3))),
            timestep=time,
            shape_list=picture_shapes,
            **_UMT5,
        ),
    ),
    Family(
        "flux3",
        ("Flux3Transformer2DModel",),
        arguments(
            **_PACKED,
            **_JOINT,
            **_IDS_4,
            image_cond_hidden_states=noise(TOKENS, "cond_in_channels"),
            image_cond_ids=grid(4),
            target_timestep=when("flow_map", time),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "bria-fibo2",
        ("BriaFibo2Transformer2DModel",),
        arguments(
            **_PICTURE,
            encoder_hidden_states=noise(
                lambda c: 1 + len(c.injection_layer_ids), WORDS, "cap_feat_dim"
            ),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "qwen-image-21",
        ("QwenImage21Transformer2DModel",),
        arguments(
            **_PACKED,
            **_CONTEXT,
            img_shapes=picture_shapes,
            img_mask=batched(lambda call: torch.arange(WORDS + TOKENS // 4) >= WORDS),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "prior",
        ("PriorTransformer",),
        arguments(
            hidden_states=noise("embedding_dim"),
            timestep=step,
            proj_embedding=noise(lambda c: c.embedding_proj_dim or c.embedding_dim),
            encoder_hidden_states=when(
                "encoder_hid_proj_type", noise("num_embeddings", "embedding_dim")
            ),
        ),
    ),
    # videos
    Family(
        "wan",
        (
            "WanTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "ChronoEditTransformer3DModel",
        ),
        arguments(**_WAN),
    ),
    Family(
        "hunyuan-video",
        ("HunyuanVideoTransformer3DModel",),
        arguments(**_HUNYUAN_VIDEO),
    ),
    Family(
        "wan-vace",
        ("WanVACETransformer3DModel",),
        arguments(**_WAN, control_hidden_states=noise("vace_in_channels", FRAMES, SIDE, SIDE)),
    ),
    Family(
        "wan-animate",
        ("WanAnimateTransformer3DModel",),
        arguments(
            **_WAN,
            pose_hidden_states=noise("latent_channels", FRAMES - 1, SIDE, SIDE),
            face_pixel_values=noise(
                3, 4 * FRAMES - 7, "motion_encoder_size", "motion_encoder_size"
            ),
        ),
    ),
    Family(
        "helios",
        ("HeliosTransformer3DModel",),
        arguments(
            **_STEPPED_VIDEO,
            **_UMT5,
            indices_latents_history_long=frames(1, 16),
            indices_latents_history_mid=frames(17, 2),
            indices_latents_history_short=frames(19, 1),
            indices_hidden_states=frames(20, FRAMES),
            latents_history_long=noise("in_channels", 16, SIDE, SIDE),
            latents_history_mid=noise("in_channels", 2, SIDE, SIDE),
            latents_history_short=noise("in_channels", 1, SIDE, SIDE),
        ),
    ),
    Family(
        "anyflow",
        ("AnyFlowTransformer3DModel",),
        arguments(**_ANYFLOW),
    ),
    Family(
        "anyflow-far",
        ("AnyFlowFARTransformer3DModel",),
        arguments(**_ANYFLOW, chunk_partition=constant([1, 2, 2])),
    ),
    Family(
        "hunyuan-video15",
        ("HunyuanVideo15Transformer3DModel",),
        arguments(**_VIDEO, **_HUNYUAN, image_embeds=first_frame),
    ),
    Family(
        "framepack",
        ("HunyuanVideoFramepackTransformer3DModel",),
        arguments(
            **_HUNYUAN_VIDEO,
            image_embeds=noise(WORDS, "image_proj_dim"),
            indices_latents=numbers(FRAMES),
            latents_clean=noise("in_channels", 2, SIDE, SIDE),
            indices_latents_clean=numbers(2),
            latents_history_2x=noise("in_channels", 2, SIDE, SIDE),
            indices_latents_history_2x=numbers(2),
            latents_history_4x=noise("in_channels", 16, SIDE, SIDE),
            indices_latents_history_4x=numbers(16),
        ),
    ),
    Family(
        "cogvideox",
        ("CogVideoXTransformer3DModel",),
        arguments(**_COGVIDEO, ofs=when("ofs_embed_dim", full(2))),
    ),
    Family(
        "consisid",
        ("ConsisIDTransformer3DModel",),
        arguments(
            **_COGVIDEO,
            id_cond=when("is_train_face", noise("LFE_id_dim")),
            id_vit_hidden=when("is_train_face", listed("LFE_num_scale", noise(577, "LFE_vit_dim"))),
        ),
    ),
    Family("mochi", ("MochiTransformer3DModel",), arguments(**_VIDEO, **_TEXT, **_MASK)),
    Family(
        "ltx",
        ("LTXVideoTransformer3DModel",),
        arguments(**_LTX, **_CAPTION, **_MASK),
    ),
    Family(
        "ltx2",
        ("LTX2VideoTransformer3DModel",),
        arguments(
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
            sigma=time,
            audio_num_frames=constant(TOKENS),
        ),
    ),
    Family(
        "latte",
        ("LatteTransformer3DModel",),
        arguments(
            hidden_states=noise("in_channels", "video_length", "sample_size", "sample_size"),
            timestep=step,
            **_CAPTION,
        ),
    ),
    Family(
        "allegro",
        ("AllegroTransformer3DModel",),
        arguments(**_STEPPED_VIDEO, **_CAPTION),
    ),
    Family(
        "easyanimate",
        ("EasyAnimateTransformer3DModel",),
        arguments(
            hidden_states=noise(lambda c: c.out_channels or c.in_channels, FRAMES, SIDE, SIDE),
            timestep=time,
            **_TEXT,
            encoder_hidden_states_t5=noise(WORDS, "text_embed_dim_t5"),
            inpaint_latents=noise(
                lambda c: c.in_channels - (c.out_channels or c.in_channels) or None,
                FRAMES,
                SIDE,
                SIDE,
            ),
        ),
    ),
    Family(
        "cosmos",
        ("CosmosTransformer3DModel",),
        arguments(
            hidden_states=noise("in_channels", lambda c: min(FRAMES, c.max_size[0]), SIDE, SIDE),
            timestep=time,
            encoder_hidden_states=cosmos_condition,
            fps=constant(24),
            padding_mask=when("concat_padding_mask", constant(torch.zeros(1, 1, 128, 128))),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "sana-video",
        ("SanaVideoTransformer3DModel",),
        arguments(**_VIDEO, **_CAPTION, guidance=guidance(0.45)),
    ),
    Family("motif-video", ("MotifVideoTransformer3DModel",), arguments(**_VIDEO, **_TEXT)),
    Family(
        "kandinsky5",
        ("Kandinsky5Transformer3DModel",),
        arguments(
            **_KANDINSKY,
            visual_rope_pos=numbers(FRAMES, SIDE, SIDE),
            text_rope_pos=numbers(WORDS),
        ),
    ),
    Family(
        "kandinsky6",
        ("Kandinsky6Transformer3DModel",),
        arguments(**_KANDINSKY, audio_hidden_states=noise(WORDS, "in_audio_dim")),
    ),
    Family(
        "kandinsky6-sr",
        ("Kandinsky6SRTransformer3DModel",),
        arguments(
            hidden_states=noise(FRAMES, SIDE, SIDE, lambda c: 2 * c.in_visual_dim + 1),
            timestep=time,
        ),
    ),
    Family(
        "sana-wm",
        ("SanaWMTransformer3DModel",),
        arguments(
            **_VIDEO | {"timestep": time_of_each(1, FRAMES)},
            encoder_hidden_states=noise(1, WORDS, "caption_channels"),
            **_MASK,
        ),
    ),
    Family(
        "sana-wm-refiner",
        ("SanaWMLTX2RefinerTransformer3DModel",),
        arguments(
            **_PACKED | {"timestep": time_of_each(TOKENS)},
            **_CAPTION,
            video_rotary_emb=batched(
                rotation(TOKENS, lambda c: c.num_attention_heads * c.attention_head_dim)
            ),
        ),
    ),
    # sounds
    Family(
        "stable-audio",
        ("StableAudioDiTModel",),
        arguments(
            **_SOUND,
            encoder_hidden_states=noise(WORDS, "cross_attention_input_dim"),
            global_hidden_states=noise(1, "global_states_input_dim"),
            rotary_embedding=rotation(TOKENS + 1, lambda c: c.attention_head_dim // 2),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "stable-audio3",
        ("StableAudio3DiTModel",),
        arguments(
            hidden_states=noise("io_channels", TOKENS),
            timestep=time,
            encoder_hidden_states=noise(WORDS, "cond_token_dim"),
            global_hidden_states=noise("global_cond_dim"),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "ace-step",
        ("AceStepTransformer1DModel",),
        arguments(
            hidden_states=noise(TOKENS, "audio_acoustic_hidden_dim"),
            timestep=time,
            timestep_r=time,
            encoder_hidden_states=noise(
                WORDS, lambda c: c.get("encoder_hidden_size") or c.hidden_size
            ),
            context_latents=noise(TOKENS, lambda c: c.in_channels - c.audio_acoustic_hidden_dim),
        ),
        largest_timestep=1.0,
    ),
    Family(
        "longcat-audio",
        ("LongCatAudioDiTTransformer",),
        arguments(
            hidden_states=noise(TOKENS, "latent_dim"),
            timestep=time,
            encoder_hidden_states=noise(WORDS, "dit_text_dim"),
            attention_mask=mask(TOKENS),
            latent_cond=noise(TOKENS, "latent_dim"),
            **_MASK,
        ),
        largest_timestep=1.0,
    ),
    Family(
        "minimax-music3",
        ("MiniMaxMusic3Transformer1DModel",),
        arguments(
            **_SOUND,
            encoder_hidden_states=noise(TOKENS, "condition_dim"),
        ),
        largest_timestep=1.0,
    ),
)
