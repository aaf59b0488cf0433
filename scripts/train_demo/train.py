# SPDX-License-Identifier: Apache-2.0
"""Train the bundled model (classifier, VAE, DiT), and write a standard diffusers ``DiTPipeline``.

    npm pack emoji-datasource-google@16.0.0
    PYTHONPATH=scripts python -m train_demo.train --data emoji-datasource-google-16.0.0.tgz --work build/demo

Seeded. The same command resumes an interrupted run: every stage keeps its state in ``--work``. On two
CPU cores the defaults take about two hours, on a GPU minutes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_demo.data import load_emoji
from train_demo.stage import Run, prepare

from dtq.demo.classifier import EmojiClassifier
from dtq.evaluate.metrics.fid import FeatureMoments

NULL_CLASS = 1000  # label of the unconditional branch, hard-coded in DiTPipeline


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Flip a batch with probability 0.5 and shift it by up to 3 pixels; float (B, 3, H, W), white outside."""
    if torch.rand((), generator=rng) < 0.5:
        images = images.flip(3)
    dy, dx = torch.randint(0, 7, (2,), generator=rng).tolist()
    size = images.shape[-1]
    return F.pad(images, (3, 3, 3, 3), value=1.0)[..., dy : dy + size, dx : dx + size]


def train_classifier(
    images: Tensor, labels: Tensor, work: Path, steps: int, device: str
) -> EmojiClassifier:
    """Train the classifier whose features measure domain FID; returns the averaged weights."""
    torch.manual_seed(1)
    run = Run("classifier", EmojiClassifier(int(labels.max()) + 1).to(device), work, steps, 2e-3)

    def loss_of(rng: torch.Generator) -> Tensor:
        pick = torch.randint(0, len(images), (64,), generator=rng)
        x = augment(images[pick].float() / 255, rng).to(device)
        with torch.autocast(device, torch.bfloat16):
            logits = run.model(x)
        return F.cross_entropy(logits.float(), labels[pick].to(device), label_smoothing=0.05)

    for _ in run.loop(loss_of):
        pass
    model = run.average.cpu()
    assert isinstance(model, EmojiClassifier)
    print(f"classifier: {accuracy(model, images, labels):.1%} of its training images", flush=True)
    return model


@torch.no_grad()
def accuracy(model: EmojiClassifier, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy, 0 to 1, on uint8 images (N, 3, H, W) with labels int64 (N,)."""
    found = torch.cat([model(batch.float() / 255).argmax(1) for batch in images.split(256)])
    return int((found == labels).sum()) / len(labels)


def new_vae() -> AutoencoderKL:
    """Four latent channels at a quarter of the resolution; convolutions only."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def train_vae(images: Tensor, work: Path, steps: int, device: str) -> AutoencoderKL:
    """Train the autoencoder with L1, L2, image gradients and a small KL term; returns the averaged weights."""
    torch.manual_seed(2)
    run = Run("vae", new_vae().to(device), work, steps, 2e-3)

    def loss_of(rng: torch.Generator) -> Tensor:
        pick = torch.randint(0, len(images), (32,), generator=rng)
        x = augment(images[pick].float() / 255, rng).to(device) * 2 - 1
        with torch.autocast(device, torch.bfloat16):
            posterior = run.model.encode(x).latent_dist  # type: ignore[operator]
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=rng).to(device)
            z = mean + noise * torch.exp(0.5 * logvar)
            y = run.model.decode(z).sample.float()  # type: ignore[operator]
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        edges = (y - x).diff(dim=2).abs().mean() + (y - x).diff(dim=3).abs().mean()
        return (y - x).abs().mean() + 2 * (y - x).square().mean() + 0.5 * edges + 1e-4 * kl

    for _ in run.loop(loss_of):
        print(f"vae: {psnr_of(run.average, images[::16], device):.2f} dB", flush=True)
    vae = run.average.cpu()
    assert isinstance(vae, AutoencoderKL)
    return vae


@torch.no_grad()
def psnr_of(vae: Any, images: Tensor, device: str) -> float:
    """PSNR in dB of the reconstruction of uint8 images (N, 3, H, W), peak 1."""
    error = 0.0
    for chunk in images.split(64):
        x = chunk.to(device).float() / 255
        y = vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        error += float((y.clamp(0, 1) - x).square().mean()) * len(chunk) / len(images)
    return -10 * math.log10(error)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latent means of uint8 images, float (N, 4, 16, 16), not yet scaled."""
    return torch.cat(
        [vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode() for chunk in images.split(64)]
    )


def new_dit() -> DiTTransformer2DModel:
    """Eight adaLN-zero blocks of width 256 on 64 tokens; standard class, epsilon prediction."""
    dit = DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    for block in dit.transformer_blocks:  # adaLN-zero: every block starts as the identity
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        table = block.norm1.emb.class_embedder.embedding_table.weight
        nn.init.normal_(table, std=0.02)
        with torch.no_grad():
            table[99:NULL_CLASS] = 0  # unused labels; the pipeline requires this size
    nn.init.zeros_(dit.proj_out_2.weight)
    nn.init.zeros_(dit.proj_out_2.bias)
    return dit


def new_scheduler() -> DDIMScheduler:
    """The linear schedule of DiT, sampled deterministically."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def train_dit(
    latents: Tensor, labels: Tensor, work: Path, steps: int, batch: int, device: str
) -> DiTTransformer2DModel:
    """Train the transformer on scaled latents (N, 4, 16, 16), with min-SNR weights; averaged weights."""
    torch.manual_seed(3)
    # eval mode: else the label embedder of each block would drop labels at random
    run = Run("dit", new_dit().to(device).eval(), work, steps, 1.5e-3, muon=True)
    alphas = new_scheduler().alphas_cumprod
    # half of the images are people in skin tones: draw labels uniformly, else animals stay blobs
    weights = 1 / labels.bincount()[labels]

    def loss_of(rng: torch.Generator) -> Tensor:
        pick = torch.multinomial(weights, batch, replacement=True, generator=rng)
        x0 = latents[pick]
        t = (torch.rand(batch, generator=rng) + torch.arange(batch)) / batch * 1000
        t = t.long().clamp(0, 999)  # stratified over the trajectory
        noise = torch.randn(x0.shape, generator=rng)
        a = alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        label = labels[pick].clone()
        label[torch.rand(batch, generator=rng) < 0.1] = NULL_CLASS
        snr = alphas[t] / (1 - alphas[t])
        weight = (snr.clamp(max=5.0) / snr).to(device)  # Min-SNR (2303.09556, sec. 3.4), epsilon
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            guess = run.model(
                x.to(device), timestep=t.to(device), class_labels=label.to(device)
            ).sample
        error = (guess.float() - noise.to(device)).square().mean((1, 2, 3))
        return (weight * error).mean()

    for _ in run.loop(loss_of):
        pass
    dit = run.average.cpu()
    assert isinstance(dit, DiTTransformer2DModel)
    return dit


def export(
    out: Path,
    dit: DiTTransformer2DModel,
    vae: AutoencoderKL,
    classifier: EmojiClassifier,
    names: list[str],
    images: Tensor,
) -> None:
    """Write the standard pipeline in fp16, and the classifier with the statistics of its features.

    Args:
        out: folder of the pipeline.
        dit: the transformer.
        vae: the autoencoder.
        classifier: measures domain FID.
        names: of the labels.
        images: of which the statistics are taken.
    """
    pipe = DiTPipeline(
        transformer=dit.half(),
        vae=vae.half(),
        scheduler=new_scheduler(),
        id2label=dict(enumerate(names)),
    )
    pipe.save_pretrained(out)
    # DiTPipeline takes id2label but does not save it
    index = json.loads((out / "model_index.json").read_text())
    index["id2label"] = {str(i): name for i, name in enumerate(names)}
    (out / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (out / "classifier").mkdir(exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in classifier.state_dict().items()}
    with torch.no_grad():
        chunks = [classifier.features(chunk.float() / 255) for chunk in images.split(256)]
    real = FeatureMoments.of(torch.cat(chunks))
    weights["real.mean"], weights["real.cov"] = real.mean.float(), real.cov.float()
    save_file(weights, out / "classifier" / "model.safetensors", {"labels": json.dumps(names)})
    (out / "README.md").write_text(_CARD)


_CARD = """# The bundled demo model of dtq

A class-conditional diffusion transformer of 64x64 emoji in 99 subcategories: a stock diffusers
`DiTPipeline` (`DiTTransformer2DModel`, 8 blocks of width 256, adaLN-zero, epsilon prediction;
`AutoencoderKL` to 16x16x4), float16. `classifier/` holds a small classifier of the same images. Its
penultimate features, and their moments over the training images, measure FID in this domain.

Trained from scratch by `scripts/train_demo/train.py` on the images of the npm package
`emoji-datasource-google` 16.0.0: Noto Emoji, Copyright Google Inc., images under Apache License
2.0, fonts under SIL Open Font License 1.1; the package itself under MIT. No image is included.
The weights are under Apache License 2.0.
"""


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The npm package.")
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Folder for state files."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("dtq/demo/pipeline"))
@click.option("--classifier-steps", default=1800, show_default=True)
@click.option("--vae-steps", default=2600, show_default=True)
@click.option("--dit-steps", default=5000, show_default=True)
@click.option("--batch", default=64, show_default=True, help="Latents per DiT step.")
@click.option("--threads", default=0, help="CPU threads; 0 for torch's default.")
@click.option("--only", type=click.Choice(["vae", "dit", "classifier", "export"]), multiple=True)
def main(
    data: Path,
    work: Path,
    out: Path,
    classifier_steps: int,
    vae_steps: int,
    dit_steps: int,
    batch: int,
    threads: int,
    only: tuple[str, ...],
) -> None:
    device = prepare(work, threads)
    images, labels, names = load_emoji(data)
    print(f"{len(images)} images, {len(names)} labels, on {device}", flush=True)
    stages = set(only or ("vae", "dit", "classifier", "export"))
    if "vae" in stages:
        train_vae(images, work, vae_steps, device)
    if stages & {"dit", "export"}:
        vae = train_vae(images, work, 0, "cpu")
        latents = encode(vae, images)
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
        latents = latents * vae.config.scaling_factor
    if "dit" in stages:
        train_dit(latents, labels, work, dit_steps, batch, device)
    if stages & {"classifier", "export"}:
        classifier = train_classifier(
            images, labels, work, classifier_steps if "classifier" in stages else 0, device
        )
    if "export" in stages:
        export(
            out, train_dit(latents, labels, work, 0, batch, "cpu"), vae, classifier, names, images
        )


if __name__ == "__main__":
    main()
