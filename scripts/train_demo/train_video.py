# SPDX-License-Identifier: Apache-2.0
"""Train ``demo-video``: a standard diffusers ``LattePipeline`` for short clips of moving emoji.

    npm pack emoji-datasource-google@16.0.0
    PYTHONPATH=scripts python -m train_demo.train_video --data emoji-datasource-google-16.0.0.tgz --work build/video

The autoencoder is that of ``demo``, applied frame by frame. The text encoder is trained together with
the transformer. First the spatial blocks learn single frames, then all blocks learn clips. Seeded. The
same command resumes an interrupted run: every stage keeps its state in ``--work``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_demo import train as image_model
from train_demo.clips import FRAMES, SIZE, THINGS, captions, clips
from train_demo.data import load_cutouts
from train_demo.stage import Run, portable, prepare
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dtq import demo
from dtq.checkpoint import writer
from dtq.pipelines import call_defaults

WORDS = 64  # width of the text encoder
SET = "moving-emoji"
LENGTH = 120  # tokens to which LattePipeline pads the captions of several clips


def new_scheduler() -> DDIMScheduler:
    """The schedule of ``demo``, with velocity prediction (2202.00512, app. D).

    The motion is decided at high noise levels. There a predicted noise would have to be exact to five
    digits to determine the clip, whereas the velocity is the negative clip.
    """
    scheduler = image_model.new_scheduler()
    scheduler.register_to_config(prediction_type="v_prediction")
    return scheduler


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of the captions, and an end token."""
    words = sorted({word for caption in captions() for word in caption.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    )


class Film(nn.Module):
    """The two trained components of the pipeline: text encoder and transformer."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=words,
                d_model=WORDS,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        self.transformer = LatteTransformer3DModel(
            num_attention_heads=6,
            attention_head_dim=32,
            in_channels=4,
            out_channels=8,  # the pipeline ignores the second half, a variance that is not trained
            num_layers=6,
            cross_attention_dim=192,
            attention_bias=True,
            sample_size=16,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=WORDS,
            video_length=FRAMES,
        )
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        for block in self.transformer.temporal_transformer_blocks:
            # training on clips starts from single frames: the temporal blocks add nothing yet
            for last in (block.attn1.to_out[0], block.ff.net[2]):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor, blank: Tensor) -> Tensor:
        """Predict the velocity, of the shape of x.

        Args:
            x: (B, 4, F, H, W), F 1 or FRAMES.
            t: timestep (B,).
            tokens: int64 (B, L), the captions.
            mask: int64 (B, L), zero for padding; all ones if padding is not masked.
            blank: bool (B,), whether the prompt is empty; its padding is not masked.
        """
        text = self.text_encoder(tokens, attention_mask=mask).last_hidden_state
        text = text * (mask.bool() | blank[:, None])[..., None]
        guess: Tensor = self.transformer(
            x, timestep=t, encoder_hidden_states=text, enable_temporal_attentions=x.shape[2] > 1
        ).sample
        return guess[:, :4]


def train(
    name: str,
    film: Film,
    latents: Tensor,
    labels: Tensor,
    work: Path,
    steps: int,
    batch: int,
    lr: float,
    device: str,
) -> Film:
    """Train text encoder and transformer, with truncated SNR weights.

    Args:
        name: of the stage.
        film: the model at the start.
        latents: scaled, (N, 4, F, 16, 16); with F = 1 the temporal blocks are skipped.
        labels: int64 (N,), indices of the captions.
        work: folder of state files.
        steps: number of training steps.
        batch: clips per step.
        lr: peak learning rate.
        device: for training.

    Returns:
        The model with averaged weights.
    """
    run = Run(name, film.requires_grad_(True).to(device), work, steps, lr, muon=True)
    scheduler, tokenizer, texts = new_scheduler(), new_tokenizer(), captions()

    def loss_of(rng: torch.Generator) -> Tensor:
        pick = torch.randint(0, len(latents), (batch,), generator=rng)
        x0 = latents[pick].float()
        t = (torch.rand(batch, generator=rng) + torch.arange(batch)) / batch * 1000
        t = t.long().clamp(0, 999)[torch.randperm(batch, generator=rng)]
        noise = torch.randn(x0.shape, generator=rng)
        x, velocity = scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)
        blank = torch.rand(batch, generator=rng) < 0.1
        # the pipeline removes the padding of a single caption, and zeroes that of several
        long = bool(torch.rand((), generator=rng) < 0.25)
        prompts = ["" if b else texts[i] for b, i in zip(blank, labels[pick].tolist(), strict=True)]
        words = tokenizer(
            prompts, padding="max_length" if long else "longest", max_length=LENGTH,
            return_tensors="pt",
        )  # fmt: skip
        # an error of the clip weighs SNR + 1 (2202.00512, sec. 4), at most 5 (2303.09556)
        weight = (5 * (1 - scheduler.alphas_cumprod[t])).clamp(max=1.0).to(device)
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            guess = run.model(
                x.to(device),
                t.to(device),
                words.input_ids.to(device),
                words.attention_mask.to(device),
                blank.to(device),
            )
        error = (guess.float() - velocity.to(device)).square().mean((1, 2, 3, 4))
        return (weight * error).mean()

    for _ in run.loop(loss_of):
        pass
    mean = run.average.cpu()
    assert isinstance(mean, Film)
    return mean


def export(out: Path, film: Film, vae: AutoencoderKL) -> None:
    """Write the standard pipeline, and the defaults of its call.

    All weights are fp16 except those of the small text encoder. Without a dtype argument,
    transformers loads it in the dtype of the file, and diffusers the other components in float32.
    """
    pipe = LattePipeline(
        tokenizer=new_tokenizer(),
        text_encoder=film.text_encoder.float(),
        vae=vae.half(),
        transformer=film.transformer.half(),
        scheduler=new_scheduler(),
    )
    pipe.save_pretrained(out)
    portable(out, ("model_index.json", "tokenizer/tokenizer_config.json"))
    writer.drop_name_or_path(out / "vae" / "config.json")
    call_defaults.write(
        out,
        call_defaults.CallDefaults({"height": SIZE, "width": SIZE, "video_length": FRAMES}, SET),
    )
    (out / "README.md").write_text(_CARD)


_CARD = """# The bundled video model of dtq

Clips of 8 frames of 64x64 in which one of 32 emoji moves, grows, shrinks, spins or stands, by a
caption such as `red heart moves left`: a stock diffusers `LattePipeline` with a
`LatteTransformer3DModel` (6 spatial and 6 temporal blocks of width 192, velocity prediction), a
`T5EncoderModel` of two layers, and the `AutoencoderKL` of the bundled image model, frame by
frame; float16, the text encoder float32.

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe("red heart moves left", height=64, width=64, video_length=8, guidance_scale=4)

Trained from scratch by `scripts/train_demo/train_video.py` on images of the npm package
`emoji-datasource-google` 16.0.0: Noto Emoji, Copyright Google Inc., images under Apache License
2.0, fonts under SIL Open Font License 1.1; the package itself under MIT. No image is included.
The weights are under Apache License 2.0.
"""


def _encode(vae: Any, film: Tensor) -> Tensor:
    """Scaled latents (N, 4, F, 16, 16), float16, of uint8 clips (N, F, 3, 64, 64)."""
    latents = image_model.encode(vae, film.flatten(0, 1)) * vae.config.scaling_factor
    return latents.unflatten(0, film.shape[:2]).transpose(1, 2).half()


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The npm package.")
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Folder for state files."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("dtq/demo/video"))
@click.option("--variants", default=8, show_default=True, help="Clips per caption.")
@click.option("--frame-steps", default=1200, show_default=True)
@click.option("--clip-steps", default=3000, show_default=True)
@click.option("--batch", default=64, show_default=True, help="Frames per step.")
@click.option("--threads", default=0, help="CPU threads; 0 for torch's default.")
def main(
    data: Path,
    work: Path,
    out: Path,
    variants: int,
    frame_steps: int,
    clip_steps: int,
    batch: int,
    threads: int,
) -> None:
    device = prepare(work, threads)
    vae = AutoencoderKL.from_pretrained(demo.folder() / "vae", torch_dtype=torch.float32)
    ready = work / "latents.pt"
    if not ready.exists():
        frames, labels = clips(load_cutouts(data, [*THINGS.values()]), variants, seed=0)
        print(f"{len(frames)} clips, encoded on the CPU", flush=True)
        torch.save({"latents": _encode(vae, frames), "labels": labels}, ready)
    state = torch.load(ready, weights_only=True)
    latents, labels = state["latents"], state["labels"]
    torch.manual_seed(4)
    film = Film(len(new_tokenizer()))
    frames = latents.transpose(1, 2).flatten(0, 1)[:, :, None]
    film = train(
        "frames", film, frames, labels.repeat_interleave(FRAMES), work, frame_steps, batch, 1.5e-3,
        device,
    )  # fmt: skip
    film = train("clips", film, latents, labels, work, clip_steps, batch // FRAMES, 1e-3, device)
    export(out, film, vae)


if __name__ == "__main__":
    main()
