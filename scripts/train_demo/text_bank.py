# SPDX-License-Identifier: Apache-2.0
"""The training set of ``demo-text`` as latents and tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor
from train_demo import train as image_model
from train_demo.data import load_cutouts
from train_demo.painter import SIDE, token_ids
from train_demo.scenes import THINGS, scenes

from dtq import demo

SHARES = (0.35, 0.13, 0.52)  # of each batch: one thing, a counted or small thing, a pair


def pack(latents: Tensor) -> Tensor:
    """Latents (N, 4, 16, 16) as tokens (N, SIDE**2, 16), as the pipeline packs them."""
    tokens: Tensor = FluxPipeline._pack_latents(latents, len(latents), 4, 2 * SIDE, 2 * SIDE)
    return tokens


class Bank:
    """The training set as scaled latents and tokens, kept in a file.

    Args:
        work: folder of the file.
        data: the npm package.
        pairs: number of scenes of two things.
    """

    def __init__(self, work: Path, data: Path, pairs: int) -> None:
        path = work / "latents.pt"
        if not path.exists():
            vae = AutoencoderKL.from_pretrained(demo.folder() / "vae", torch_dtype=torch.float32)
            frames, captions, kinds = scenes(load_cutouts(data, [*THINGS.values()]), pairs, seed=0)
            print(f"{len(frames)} scenes of {len(THINGS)} things, encoded on the CPU", flush=True)
            latents = image_model.encode(vae, frames)
            state = {"latents": latents, "captions": captions, "kinds": kinds}
            state["shift"], state["scale"] = float(latents.mean()), float(1 / latents.std())
            torch.save(state, path)
        state = torch.load(path, weights_only=True)
        self.shift, self.scale = state["shift"], state["scale"]
        self.latents = pack((state["latents"] - self.shift) * self.scale)
        self.captions: list[str] = state["captions"]
        self.clip, self.t5 = token_ids(self.captions)
        self.blank = token_ids([""])
        share = torch.tensor(SHARES) / state["kinds"].bincount()
        self.weights = share[state["kinds"]]

    def batch(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw ``count`` indices by the shares of the kinds."""
        return torch.multinomial(self.weights, count, replacement=True, generator=rng)

    def tokens(self, pick: Tensor, blank: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the captions ``pick``; of the empty caption where ``blank`` (B,) is set."""
        return (
            torch.where(blank[:, None], self.blank[0], self.clip[pick]),
            torch.where(blank[:, None], self.blank[1], self.t5[pick]),
        )
