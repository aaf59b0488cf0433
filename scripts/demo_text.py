# SPDX-License-Identifier: Apache-2.0
"""Measure what ``demo-text`` generates, a pipeline that ``train_demo.train_text`` wrote.

    python scripts/demo_text.py dtq/demo/text --data emoji-datasource-google-16.0.0.tgz
    python scripts/demo_text.py dtq/demo/text-4step --steps 4 --data emoji-datasource-google-16.0.0.tgz

Prints how often each thing of a caption is recognized where the caption puts it, and draws a sheet:
one caption per picture, in reading order.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d
from train_demo.data import load_cutouts
from train_demo.scenes import COUNTS, RELATIONS, SIZE, THINGS, count_scene, draw, pair_scene

from dtq.evaluate.metrics import images
from dtq.pipelines import call_defaults, prompts

SHEET = [
    ["red heart", "smiling face", "angry face", "cat face", "panda", "frog", "penguin", "octopus"],
    ["rose", "red apple", "watermelon", "hamburger", "red car", "rocket", "rainbow", "christmas tree"],
    ["basketball", "guitar", "light bulb", "crown", "small star eyes face", "small cake",
     "two yellow star", "four green heart"],
    ["red apple and green apple", "dog face left of cat face", "sun right of cloud", "ghost and pumpkin",
     "crown above lion", "blue heart below red heart", "bee above sunflower", "rocket above globe"],
]  # fmt: skip


@torch.no_grad()
def sample(pipe: DiffusionPipeline, texts: list[str], steps: int, guidance: float) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], one per caption; the seed is the index of the caption."""
    made = []
    for i in range(0, len(texts), 8):
        seeds = [torch.Generator().manual_seed(j) for j in range(i, min(i + 8, len(texts)))]
        made += pipe(
            texts[i : i + 8], generator=seeds, num_inference_steps=steps, guidance_scale=guidance,
            output_type="pt", **call_defaults.of(pipe).sizes,
        ).images  # fmt: skip
    return torch.stack(made).float().cpu()


def placed(caption: str) -> list[tuple[str, float, float, float]]:
    """What a caption puts where: thing, x, y, side; see ``train_demo.scenes``."""
    if caption in THINGS:
        return count_scene("", caption)[1]
    for relation in RELATIONS:
        first, _, second = caption.partition(f" {relation} ")
        if first in THINGS and second in THINGS:
            return pair_scene(first, relation, second)[1]
    count, _, thing = caption.partition(" ")
    if count in COUNTS and thing in THINGS:
        return count_scene(count, thing)[1]
    raise ValueError(f"not a caption of the training set: {caption}")


def recognized(image: Tensor, caption: str, cutouts: Mapping[str, Image.Image]) -> list[bool]:
    """Whether each thing is the nearest of all in its place, by means over 4x4 pixels.

    Args:
        image: (3, SIZE, SIZE) in [0, 1].
        caption: of the image.
        cutouts: RGBA, by short name.
    """
    names, right = list(THINGS), []
    for thing, x, y, side in placed(caption):
        drawn = torch.stack([draw(cutouts, [(n, x, y, side)], (0, 0), 1.0) for n in names]) / 255
        box = [
            slice(round(SIZE * max(0, c - side / 2)), round(SIZE * min(1, c + side / 2)))
            for c in (y, x)
        ]
        crop = (slice(None), slice(None), *box)
        ours, theirs = (avg_pool2d(batch[crop], 4).flatten(1) for batch in (image[None], drawn))
        right.append(names[int(torch.cdist(ours, theirs).argmin())] == thing)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the pipeline")
    parser.add_argument("--data", type=Path, required=True, help="the npm package")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.5])
    parser.add_argument("--no-numbers", action="store_true", help="only draw the sheet")
    parser.add_argument("--out", type=Path, default=Path("demo-text.png"), help="the sheet")
    options = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    rows = [sample(pipe, row, options.steps, options.guidance[0]) for row in SHEET]
    images.sheet(rows).save(options.out)
    if options.no_numbers:
        return
    cutouts = load_cutouts(options.data, [*THINGS.values()])
    texts = list(prompts.load("emoji-scenes", pipe, 64).entries)
    for guidance in options.guidance:
        made = sample(pipe, texts, options.steps, guidance)
        hits = [recognized(image, text, cutouts) for image, text in zip(made, texts, strict=True)]
        things = [hit for of_image in hits for hit in of_image]
        print(
            f"{len(texts)} captions, {options.steps} steps, guidance {guidance:g}: things "
            f"{sum(things) / len(things):.0%}, captions {sum(map(all, hits)) / len(hits):.0%}"
        )


if __name__ == "__main__":
    main()
