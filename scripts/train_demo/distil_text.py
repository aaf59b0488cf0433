# SPDX-License-Identifier: Apache-2.0
"""The 4-step form of ``demo-text``: a student of the guided trajectories of the trained model.

The trajectory of the model (the teacher) from pure noise to the image is cut into four segments. The
student learns to cross a segment in one Euler step from the state of the teacher at its start, at a
fixed guidance scale (progressive distillation, 2202.00512, sec. 3, in one round; guidance as in
2210.03142, stage 1). It has the weights of the teacher at the start, without the input of the
guidance scale.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_demo.painter import SIDE, Painter, is_hidden
from train_demo.stage import Run
from train_demo.text_bank import Bank

STEPS = 4
SUBSTEPS = 5  # Euler steps of the teacher per segment
GUIDANCE = 3.5  # the default of FluxPipeline


@torch.no_grad()
def without_guidance(teacher: Painter, guidance: float) -> Painter:
    """The same function at one guidance scale, as a model that does not take one.

    Args:
        teacher: takes the guidance scale.
        guidance: its embedding is added to the bias of the timestep embedding.
    """
    embed: Any = teacher.transformer.time_text_embed
    scale = torch.tensor([1000 * guidance])
    shift = embed.guidance_embedder(embed.time_proj(scale))[0]
    student = Painter(guidance=False)
    state = {k: v for k, v in teacher.state_dict().items() if ".guidance_embedder." not in k}
    student.load_state_dict(state)
    embed = student.transformer.time_text_embed
    embed.timestep_embedder.linear_2.bias += shift
    return student


@torch.no_grad()
def trajectories(
    teacher: Painter, bank: Bank, count: int, rng: torch.Generator
) -> dict[str, Tensor]:
    """Guided trajectories of random captions of the training set.

    Returns:
        ``pick`` int64 (count,), indices of the captions; ``states`` float16
        (count, STEPS + 1, SIDE**2, 16), from noise to image.
    """
    device = next(teacher.parameters()).device
    pick = bank.batch(count, rng)
    clip, t5 = bank.tokens(pick, torch.zeros(count, dtype=torch.bool))
    text = teacher.encode(clip.to(device), t5.to(device))
    x = torch.randn(count, SIDE**2, 16, generator=rng).to(device)
    scale = torch.full((count,), GUIDANCE, device=device)
    states, total = [x], STEPS * SUBSTEPS
    for i in range(total):
        sigma = torch.full((count,), 1 - i / total, device=device)
        x = x - teacher.velocity(x, sigma, text, scale).float() / total
        if (i + 1) % SUBSTEPS == 0:
            states.append(x)
    return {"pick": pick, "states": torch.stack(states, 1).half().cpu()}


def teach(
    teacher: Painter, bank: Bank, work: Path, count: int, chunk: int, device: str
) -> dict[str, Tensor]:
    """``count`` trajectories in chunks, each kept in a file of its own."""
    teacher = teacher.to(device)
    parts = []
    for i in range(math.ceil(count / chunk)):
        path = work / f"trajectories-{i:03d}.pt"
        if not path.exists():
            rng = torch.Generator().manual_seed(7_000_003 + i)
            with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                part = trajectories(teacher, bank, chunk, rng)
            torch.save(part, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            print(f"trajectories {(i + 1) * chunk}/{count}", flush=True)
        parts.append(torch.load(path, weights_only=True))
    return {key: torch.cat([part[key] for part in parts]) for key in ("pick", "states")}


def distil(
    teacher: Painter,
    bank: Bank,
    taught: dict[str, Tensor],
    work: Path,
    steps: int,
    batch: int,
    device: str,
    compiled: bool = False,
) -> Painter:
    """Train the student on trajectories; the text encoders stay. Returns the averaged weights."""
    torch.manual_seed(6)
    student = without_guidance(teacher.cpu(), GUIDANCE).to(device)
    for encoder in (student.text_encoder, student.text_encoder_2):
        encoder.requires_grad_(False)
    run = Run("student", student, work, steps, 8e-4, muon=is_hidden)
    if compiled:
        student.transformer.compile_repeated_blocks(dynamic=False)

    def loss_of(rng: torch.Generator) -> Tensor:
        row = torch.randint(0, len(taught["pick"]), (batch,), generator=rng)
        segment = torch.arange(batch) % STEPS
        x = taught["states"][row, segment].float().to(device)
        target = (x - taught["states"][row, segment + 1].float().to(device)) * STEPS
        sigma = (1 - segment / STEPS).to(device)
        pick = taught["pick"][row]
        clip, t5 = bank.tokens(pick, torch.zeros(batch, dtype=torch.bool))
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                text = student.encode(clip.to(device), t5.to(device))
            guess = student.velocity(x, sigma, text, None)
        return (guess.float() - target).square().mean()

    for _ in run.loop(loss_of):
        pass
    model: nn.Module = run.average.cpu()
    assert isinstance(model, Painter)
    return model
