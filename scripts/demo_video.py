# SPDX-License-Identifier: Apache-2.0
"""Measure the numbers of docs/demo.md for the bundled video model.

    python scripts/demo_video.py --data emoji-datasource-google-16.0.0.tgz

Prints how often the training clip that is nearest to a generated clip has the requested caption, and
draws the strip.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import avg_pool2d
from train_demo.clips import MOTIONS, THINGS, captions, clip
from train_demo.data import load_cutouts

from dtq import demo
from dtq.evaluate.metrics import images
from dtq.pipelines import call_defaults, prompts

STRIP = [
    "red heart moves left",
    "panda moves down",
    "rocket moves up",
    "red car moves right",
    "watermelon turns",
    "green apple grows",
    "basketball shrinks",
    "cat face stands still",
]


@torch.no_grad()
def sample(pipe: DiffusionPipeline, texts: list[str], steps: int, guidance: float) -> Tensor:
    """Clips (B, F, 3, H, W) in [0, 1], one per caption; the seed is the index of the caption."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(texts))]
    output = pipe(
        texts, generator=generators, num_inference_steps=steps, guidance_scale=guidance,
        output_type="pt", **call_defaults.of(pipe).sizes,
    )  # fmt: skip
    return torch.as_tensor(output.frames)


def coarse(clips: Tensor) -> Tensor:
    """Means over 4x4 pixels, (B, F * 3 * H/4 * W/4), so that shifts by a pixel hardly matter."""
    return avg_pool2d(clips.flatten(0, 1), 4).reshape(len(clips), -1)


def shares(generated: Tensor, texts: list[str], drawn: Tensor) -> dict[str, float]:
    """How often the nearest drawn clip has the same caption, the same thing, the same motion."""
    guesses = torch.cdist(coarse(generated), coarse(drawn)).argmin(1).tolist()
    labels, n = [captions().index(text) for text in texts], len(MOTIONS)
    pairs = list(zip(guesses, labels, strict=True))
    return {
        "caption": sum(a == b for a, b in pairs) / len(pairs),
        "thing": sum(a // n == b // n for a, b in pairs) / len(pairs),
        "motion": sum(a % n == b % n for a, b in pairs) / len(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the npm package")
    parser.add_argument("--model", type=Path, default=demo.folder("demo-video"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "docs" / "demo-video.png"
    )
    options = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    things = load_cutouts(options.data, [*THINGS.values()])
    drawn = torch.stack([clip(things[t], m) for t in THINGS.values() for m in MOTIONS]) / 255
    texts = list(prompts.load("moving-emoji", pipe, 64).entries)
    for guidance in options.guidance:
        generated = torch.cat(
            [sample(pipe, texts[i : i + 8], options.steps, guidance) for i in range(0, 64, 8)]
        )
        hits = ", ".join(f"{k} {v:.0%}" for k, v in shares(generated, texts, drawn).items())
        print(f"{len(texts)} captions, {options.steps} steps, guidance {guidance:g}: {hits}")
    images.sheet([*sample(pipe, STRIP, options.steps, options.guidance[0])]).save(options.out)


if __name__ == "__main__":
    main()
