# SPDX-License-Identifier: Apache-2.0
"""Train ``demo-text``: a standard diffusers ``FluxPipeline`` that generates emoji by caption.

    npm pack emoji-datasource-google@16.0.0
    PYTHONPATH=scripts python -m train_demo.train_text --data emoji-datasource-google-16.0.0.tgz --work build/text

The autoencoder is that of ``demo``. Text encoders and transformer are trained together by flow
matching (2210.02747); in the last quarter of the steps, half of each batch learns the guided
velocity at a random guidance scale, which is an input of the transformer as in FLUX.1-dev. Then the
transformer is distilled to four steps. Seeded. The same command resumes an interrupted run: every
stage keeps its state in ``--work``.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_demo.distil_text import distil, teach
from train_demo.export_text import export
from train_demo.painter import Painter, is_hidden
from train_demo.stage import Run, prepare
from train_demo.text_bank import Bank

GUIDED_FROM = 0.75  # share of the steps after which guidance is trained
STRONGEST = 6.0  # largest guidance scale that is trained


def draw_sigma(count: int, rng: torch.Generator) -> Tensor:
    """Noise levels (count,): logit-normal (2403.03206, sec. 3.1), one in eight uniform, stratified."""
    u = (torch.rand(count, generator=rng) + torch.arange(count)) / count
    u = u[torch.randperm(count, generator=rng)]
    normal = torch.sigmoid(2**0.5 * torch.erfinv((2 * u - 1).clamp(-0.9999, 0.9999)))
    return torch.where(torch.rand(count, generator=rng) < 0.125, u, normal)


def train_base(
    bank: Bank, work: Path, steps: int, batch: int, lr: float, device: str, compiled: bool = False
) -> Painter:
    """Train text encoders and transformer; returns the averaged weights."""
    torch.manual_seed(5)
    run = Run("base", Painter(guidance=True).to(device), work, steps, lr, muon=is_hidden)
    if compiled:
        for model in (run.model, run.average):
            model.transformer.compile_repeated_blocks(dynamic=False)  # type: ignore[operator,union-attr]

    def loss_of(rng: torch.Generator) -> Tensor:
        pick = bank.batch(batch, rng)
        x0, sigma = bank.latents[pick].to(device), draw_sigma(batch, rng).to(device)
        noise = torch.randn(x0.shape, generator=rng).to(device)
        s = sigma[:, None, None]
        x, target = (1 - s) * x0 + s * noise, noise - x0
        blank = torch.rand(batch, generator=rng) < 0.1
        scale = torch.ones(batch, device=device)
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            if run.step >= GUIDED_FROM * run.steps:
                half = batch // 2
                blank[:half] = False
                scale[:half] = 1 + (STRONGEST - 1) * torch.rand(half, generator=rng).to(device)
                difference = _difference(run.average, bank, pick[:half], x[:half], sigma[:half])
                target[:half] += (scale[:half, None, None] - 1) * difference
            clip, t5 = bank.tokens(pick, blank)
            text = run.model.encode(clip.to(device), t5.to(device))  # type: ignore[operator]
            guess = run.model.velocity(x, sigma, text, scale)  # type: ignore[operator]
        return (guess.float() - target).square().mean()

    for _ in run.loop(loss_of):
        pass
    model = run.average.cpu()
    assert isinstance(model, Painter)
    return model


@torch.no_grad()
def _difference(average: torch.nn.Module, bank: Bank, pick: Tensor, x: Tensor, s: Tensor) -> Tensor:
    """Velocity with caption minus velocity without it, by the averaged weights (2502.12154, eq. 8)."""
    count, device = len(pick), x.device
    blank = torch.arange(2 * count) >= count
    clip, t5 = bank.tokens(pick.repeat(2), blank)
    text = average.encode(clip.to(device), t5.to(device))  # type: ignore[operator]
    ones = torch.ones(2 * count, device=device)
    guess = average.velocity(x.repeat(2, 1, 1), s.repeat(2), text, ones)  # type: ignore[operator]
    with_caption, without = guess.float().chunk(2)
    return with_caption - without


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The npm package.")
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Folder for state files."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("dtq/demo"),
    show_default=True,
    help="Where the folders text and text-4step are written.",
)
@click.option("--pairs", default=6000, show_default=True, help="Scenes of two things.")
@click.option("--base-steps", default=3000, show_default=True)
@click.option("--trajectories", default=2048, show_default=True, help="For the student.")
@click.option("--student-steps", default=800, show_default=True)
@click.option("--batch", default=64, show_default=True, help="Images per step.")
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--threads", default=0, help="CPU threads; 0 for torch's default.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the blocks with a C++ compiler.")
@click.option("--only", type=click.Choice(["base", "student", "export"]), multiple=True)
def main(
    data: Path,
    work: Path,
    out: Path,
    pairs: int,
    base_steps: int,
    trajectories: int,
    student_steps: int,
    batch: int,
    lr: float,
    threads: int,
    compiled: bool,
    only: tuple[str, ...],
) -> None:
    device = prepare(work, threads)
    stages = set(only or ("base", "student", "export"))
    bank = Bank(work, data, pairs)
    base = train_base(
        bank, work, base_steps if "base" in stages else 0, batch, lr, device, compiled
    )
    if "student" in stages:
        taught = teach(base, bank, work, trajectories, 4 * batch, device)
        student = distil(base, bank, taught, work, student_steps, batch, device, compiled)
        export(out / "text-4step", student, bank)
    if "export" in stages:
        export(out / "text", base, bank)


if __name__ == "__main__":
    main()
