# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on the quantized demo model, and load it on the float model.

``python scripts/train_adapter.py`` (a few minutes of two cores). As in QLoRA (Dettmers et al. 2023)
the weights stay quantized and only the factors of the adapter are trained; the gradient passes
through a quantized linear as if it were the dequantized one. The bundled model knows 99 kinds of
emoji. The adapter teaches it cat faces of another colour: samples of the float model, with red and
blue exchanged.

The script prints the loss of the denoiser on 64 held-out noises before and after, on the quantized
model, and that of the float model without and with the same adapter.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import peft
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from torch import Tensor, nn

import dtq
from dtq import demo

TARGETS = r"transformer_blocks\.\d+\.(attn1\.to_[qkv]|attn1\.to_out\.0|ff\.net\.(0\.proj|2))"


def images(pipe: DiTPipeline, label: int, count: int) -> Tensor:
    """Latents of images to learn: samples of the model with red and blue exchanged."""
    generator = [torch.Generator().manual_seed(i) for i in range(count)]
    pipe.set_progress_bar_config(disable=True)
    pixels = pipe(
        [label] * count, generator=generator, num_inference_steps=20, output_type="pt"
    ).images
    with torch.no_grad():
        encoded = pipe.vae.encode(torch.as_tensor(pixels).flip(1) * 2 - 1).latent_dist.mode()
    return encoded * pipe.vae.config.scaling_factor


def loss_of(
    model: nn.Module, pipe: DiTPipeline, latents: Tensor, label: int, g: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14), at random timesteps."""
    count = len(latents)
    noise = torch.randn(latents.shape, generator=g)
    t = torch.randint(0, pipe.scheduler.config.num_train_timesteps, (count,), generator=g)
    noisy = pipe.scheduler.add_noise(latents, noise, t)
    labels = torch.full((count,), label)
    predicted = model(noisy, timestep=t, class_labels=labels).sample
    return (predicted[:, : noise.shape[1]] - noise).square().mean()


@torch.no_grad()
def held_out(model: nn.Module, pipe: DiTPipeline, latents: Tensor, label: int) -> float:
    """The loss on the same noises and timesteps every time."""
    model.eval()
    g = torch.Generator().manual_seed(10**6)
    return sum(float(loss_of(model, pipe, latents[:16], label, g)) for _ in range(4)) / 4


def train(
    model: nn.Module, pipe: DiTPipeline, latents: Tensor, label: int, steps: int, rate: float
) -> list[float]:
    """Train the adapter that is active; the losses of the steps."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0)
    g = torch.Generator().manual_seed(0)
    model.train()
    losses = []
    for _ in range(steps):
        batch = latents[torch.randint(0, len(latents), (16,), generator=g)]
        loss = loss_of(model, pipe, batch, label, g)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    """Quantize, train, save, load on the float model, and print the losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="w4a8", help="how to quantize; default: w4a8")
    parser.add_argument("--steps", type=int, default=200, help="steps of training; default: 200")
    parser.add_argument("--rank", type=int, default=8, help="rank of the LoRA; default: 8")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; default: 1e-3")
    parser.add_argument("--dora", action="store_true", help="train DoRA instead of LoRA")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("adapter"),
        help="folder to write; default: adapter",
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(demo.folder())
    (label,) = pipe.get_label_ids(["cat-face"])
    latents = images(pipe, label, 32)
    floats = copy.deepcopy(pipe.transformer)
    dtq.quantize(pipe, args.recipe, progress=False)
    model = pipe.transformer

    config = peft.LoraConfig(
        r=args.rank, lora_alpha=args.rank, target_modules=TARGETS, use_dora=args.dora
    )
    adapted = peft.get_peft_model(model, config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    before = held_out(adapted, pipe, latents, label)
    losses = train(adapted, pipe, latents, label, args.steps, args.rate)
    after = held_out(adapted, pipe, latents, label)
    adapted.save_pretrained(args.output)

    plain = held_out(floats, pipe, latents, label)
    loaded = peft.PeftModel.from_pretrained(floats, args.output)
    print(f"{args.recipe}, {trained} parameters trained, {args.steps} steps")
    print(f"first and last loss of training: {losses[0]:.4f} {losses[-1]:.4f}")
    print(f"quantized model, held out: {before:.4f} -> {after:.4f}")
    print(f"float model, held out:     {plain:.4f} -> {held_out(loaded, pipe, latents, label):.4f}")


if __name__ == "__main__":
    main()
