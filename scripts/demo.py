# SPDX-License-Identifier: Apache-2.0
"""Measure the numbers of docs/demo.md: ``python scripts/demo.py`` (several minutes).

Prints how often the bundled classifier recognizes the requested label, and draws the contact sheet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dtq import demo
from dtq.evaluate.metrics import extractors, images

COLUMNS = [
    "face-smiling",
    "face-affection",
    "face-concerned",
    "cat-face",
    "heart",
    "country-flag",
    "person",
    "person-fantasy",
    "hand-fingers-open",
    "animal-mammal",
    "food-fruit",
    "plant-flower",
    "time",
    "transport-ground",
    "clothing",
]


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline, labels: list[int], seeds: list[int], steps: int, guidance: float
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], one per label, each with its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = pipe(
        labels, generator=generators, num_inference_steps=steps, guidance_scale=guidance,
        output_type="pt",
    )  # fmt: skip
    return torch.as_tensor(output.images)


@torch.no_grad()
def shares(images: Tensor, labels: list[int]) -> tuple[float, float]:
    """Share of images whose label is the classifier's first guess, and among its first five."""
    guesses = extractors.load("emoji")(images)["logits"].topk(5, 1).indices  # (B, 5)
    hits = guesses == torch.tensor(labels).unsqueeze(1)
    return float(hits[:, 0].float().mean()), float(hits.any(1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--every", type=int, default=2, help="use every n-th label; the seed is the label"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="sampler steps of the classified images"
    )
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[4.0, 2.5], help="guidance scales"
    )
    parser.add_argument("--rows", type=int, default=5, help="rows of the contact sheet")
    parser.add_argument("--sheet-steps", type=int, default=30, help="sampler steps of the sheet")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "docs" / "demo-samples.png"
    )
    options = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(demo.folder())
    pipe.set_progress_bar_config(disable=True)
    labels = list(range(0, len(pipe.labels), options.every))
    for guidance in options.guidance:
        samples = sample(pipe, labels, labels, options.steps, guidance)
        first, five = shares(samples, labels)
        print(
            f"{len(labels)} labels, {options.steps} steps, guidance {guidance:g}: "
            f"first guess {first:.0%}, first five {five:.0%}"
        )
    columns = pipe.get_label_ids(COLUMNS)
    rows = [
        sample(
            pipe, columns, [100 * row + i for i in range(len(columns))], options.sheet_steps, 4.0
        )
        for row in range(options.rows)
    ]
    images.sheet(rows).save(options.out)


if __name__ == "__main__":
    main()
