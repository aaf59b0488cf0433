# SPDX-License-Identifier: Apache-2.0
"""Write ``demo-text`` and its 4-step form as standard ``FluxPipeline`` folders."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from train_demo.painter import LENGTH, Painter, new_tokenizer
from train_demo.scenes import SIZE
from train_demo.stage import portable
from train_demo.text_bank import Bank

from dtq import demo
from dtq.checkpoint import writer
from dtq.pipelines import call_defaults

SET = "emoji-scenes"
SIZES = {"height": SIZE, "width": SIZE, "max_sequence_length": LENGTH}


def export(out: Path, painter: Painter, bank: Bank) -> None:
    """Write the standard pipeline, and the defaults of its call.

    Transformer and autoencoder are bfloat16. The small text encoders are float32: without a dtype
    argument, transformers loads them in the dtype of the file, diffusers the other components in
    float32, and the pipeline needs one dtype.

    Args:
        out: the folder.
        painter: text encoders and transformer.
        bank: shift and scale of the latents.
    """
    vae = AutoencoderKL.from_pretrained(demo.folder() / "vae", torch_dtype=torch.bfloat16)
    vae.register_to_config(shift_factor=bank.shift, scaling_factor=bank.scale)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=painter.text_encoder.float(),
        tokenizer=new_tokenizer(begin=True),
        text_encoder_2=painter.text_encoder_2.float(),
        tokenizer_2=new_tokenizer(begin=False),
        transformer=painter.transformer.bfloat16(),
    )
    pipe.save_pretrained(out)
    painter.float()
    portable(
        out, ("model_index.json", *(f"tokenizer{n}/tokenizer_config.json" for n in ("", "_2")))
    )
    writer.drop_name_or_path(out / "vae" / "config.json")
    call_defaults.write(out, call_defaults.CallDefaults(SIZES, SET))
    guided = painter.transformer.config.guidance_embeds
    (out / "README.md").write_text(_CARD.format(title=_BASE if guided else _FEW))


_BASE = """# The bundled text-to-image model of dtq

64x64 emoji by caption, such as `red heart`, `two frog` or `cat face above red car`. The guidance
scale is an input of the transformer, as in FLUX.1-dev.

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe("cat face above red car", height=64, width=64, max_sequence_length=12,
         num_inference_steps=20, guidance_scale=3.5)
"""

_FEW = """# The bundled 4-step text-to-image model of dtq

The bundled text-to-image model, distilled to 4 steps at guidance 3.5. The guidance scale is no
input, as in FLUX.1-schnell. Text encoders and autoencoder are the same.

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe("cat face above red car", height=64, width=64, max_sequence_length=12,
         num_inference_steps=4)
"""

_CARD = """{title}
A stock diffusers `FluxPipeline`: a `FluxTransformer2DModel` (1 double and 4 single blocks of width
192, flow matching), a `CLIPTextModel` of one layer, a `T5EncoderModel` of two layers, both with one
token per word, and the `AutoencoderKL` of the bundled image model with a latent shift; bfloat16,
the text encoders float32.

Trained from scratch by `scripts/train_demo/train_text.py` on images of the npm package
`emoji-datasource-google` 16.0.0: Noto Emoji, Copyright Google Inc., images under Apache License
2.0, fonts under SIL Open Font License 1.1; the package itself under MIT. No image is included.
The weights are under Apache License 2.0.
"""
