# SPDX-License-Identifier: Apache-2.0
"""``FAMILIES``: the models that dtq knows by name, a row each, most used first.

``largest_timestep`` is 1 where the pipeline divides the scheduler's timesteps by 1000.
"""

from __future__ import annotations

from typing import Any

from dtq.families.base import Family
from dtq.families.inputs import (
    FRAMES,
    SIDE,
    TOKENS,
    WORDS,
    arguments,
    full,
    grid,
    guidance,
    labels,
    line,
    listed,
    mask,
    noise,
    picture_shapes,
    resolution,
    step,
    time,
)

# what many families have in common; a row may have it otherwise
_SQUARE = {"hidden_states": noise("in_channels", "sample_size", "sample_size"), "timestep": time}
_PICTURE = {"hidden_states": noise("in_channels", 32, 32), "timestep": time}
_VIDEO = {"hidden_states": noise("in_channels", FRAMES, SIDE, SIDE), "timestep": time}
_PACKED = {"hidden_states": noise(TOKENS, "in_channels"), "timestep": time}
_JOINT = {"encoder_hidden_states": noise(WORDS, "joint_attention_dim")}
_CAPTION = {"encoder_hidden_states": noise(WORDS, "caption_channels")}
_TEXT = {"encoder_hidden_states": noise(WORDS, "text_embed_dim")}
_UMT5 = {"encoder_hidden_states": noise(WORDS, "text_dim")}
_MASK = {"encoder_attention_mask": mask(WORDS)}
_POOLED = {"pooled_projections": noise("pooled_projection_dim")}
_IDS = {"img_ids": grid(3), "txt_ids": line(of=3)}
_IDS_4 = {"img_ids": grid(4), "txt_ids": line(3, of=4)}
_CROP: dict[str, Any] = {
    "original_size": full(1024, 2),
    "target_size": full(1024, 2),
    "crop_coords": full(0, 2),
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
        arguments(**_PACKED, **_JOINT, **_POOLED, **_IDS, guidance=guidance(3.5)),
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
        arguments(**_PACKED, **_JOINT, **_IDS),
        largest_timestep=1.0,
    ),
    Family(
        "longcat-image",
        ("LongCatImageTransformer2DModel",),
        arguments(**_PACKED, **_JOINT, img_ids=grid(3), txt_ids=line(1, 2, of=3)),
        largest_timestep=1.0,
    ),
    Family("bria", ("BriaTransformer2DModel",), arguments(**_PACKED, **_JOINT, **_IDS)),
    Family(
        "bria-fibo",
        ("BriaFiboTransformer2DModel",),
        arguments(
            **_PACKED,
            **_JOINT,
            **_IDS,
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
        arguments(**_SQUARE, **_TEXT, **_CROP),
    ),
    # videos
    Family(
        "wan",
        (
            "WanTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "ChronoEditTransformer3DModel",
        ),
        arguments(
            **_VIDEO | {"timestep": step},
            **_UMT5,
            encoder_hidden_states_image=noise(257, "image_dim"),
        ),
    ),
    Family(
        "hunyuan-video",
        ("HunyuanVideoTransformer3DModel",),
        arguments(**_VIDEO, **_TEXT, **_MASK, **_POOLED, guidance=guidance(6000.0)),
    ),
)
