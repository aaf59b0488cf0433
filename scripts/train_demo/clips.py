# SPDX-License-Identifier: Apache-2.0
"""What ``demo-video`` was trained on: short clips of one emoji that moves, with a caption each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FRAMES, SIZE = 8, 64
_TRAVEL = 12  # pixels to either side of the middle
_USUAL = 0.58  # of the frame's side

# words of a caption: short name in emoji.json
THINGS = {
    "smiling face": "smile",
    "angry face": "rage",
    "cat face": "cat",
    "dog face": "dog",
    "panda": "panda_face",
    "frog": "frog",
    "penguin": "penguin",
    "octopus": "octopus",
    "butterfly": "butterfly",
    "tropical fish": "tropical_fish",
    "red heart": "heart",
    "blue heart": "blue_heart",
    "green heart": "green_heart",
    "yellow star": "star",
    "sun": "sun_with_face",
    "rose": "rose",
    "rainbow": "rainbow",
    "snowman": "snowman",
    "fire": "fire",
    "red apple": "apple",
    "green apple": "green_apple",
    "banana": "banana",
    "strawberry": "strawberry",
    "watermelon": "watermelon",
    "doughnut": "doughnut",
    "sunflower": "sunflower",
    "christmas tree": "christmas_tree",
    "basketball": "basketball",
    "red balloon": "balloon",
    "rocket": "rocket",
    "red car": "car",
    "gift": "gift",
}

# words of a caption: where the thing is at a time from -1 to 1, as x and y in pixels right of and
# below the middle, side as a share of the frame's, and degrees against the clock
Place = tuple[float, float, float, float]
MOTIONS: dict[str, Callable[[float], Place]] = {
    "moves left": lambda t: (-_TRAVEL * t, 0, _USUAL, 0),
    "moves right": lambda t: (_TRAVEL * t, 0, _USUAL, 0),
    "moves up": lambda t: (0, -_TRAVEL * t, _USUAL, 0),
    "moves down": lambda t: (0, _TRAVEL * t, _USUAL, 0),
    "grows": lambda t: (0, 0, _USUAL + 0.3 * t, 0),
    "shrinks": lambda t: (0, 0, _USUAL - 0.3 * t, 0),
    "turns": lambda t: (0, 0, _USUAL, 90 * (t + 1)),
    "stands still": lambda t: (0, 0, _USUAL, 0),
}


def captions() -> list[str]:
    """Every thing in every motion, things first."""
    return [f"{thing} {motion}" for thing in THINGS for motion in MOTIONS]


def clip(picture: Image.Image, motion: str, dx: int = 0, dy: int = 0) -> Tensor:
    """Draw a picture with transparency on white, moving.

    Args:
        picture: RGBA.
        motion: a key of ``MOTIONS``.
        dx, dy: pixels that the whole path is moved by.

    Returns:
        uint8 (FRAMES, 3, SIZE, SIZE).
    """
    frames = []
    for i in range(FRAMES):
        x, y, share, angle = MOTIONS[motion](2 * i / (FRAMES - 1) - 1)
        turned = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        side = round(SIZE * share * turned.width / picture.width)
        thing = turned.resize((side, side), Image.Resampling.LANCZOS)
        frame = Image.new("RGBA", (SIZE, SIZE), "white")
        corner = round((SIZE - side) / 2 + x) + dx, round((SIZE - side) / 2 + y) + dy
        frame.paste(thing, corner, thing)
        frames.append(torch.from_numpy(np.array(frame.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(frames)


def clips(pictures: Mapping[str, Image.Image], variants: int, seed: int) -> tuple[Tensor, Tensor]:
    """Every caption ``variants`` times, each time a little elsewhere.

    Args:
        pictures: RGBA, by short name.

    Returns:
        uint8 (N, FRAMES, 3, SIZE, SIZE), and int64 (N,): places in :func:`captions`.
    """
    rng = torch.Generator().manual_seed(seed)
    found, labels = [], []
    for i, (thing, motion) in enumerate((t, m) for t in THINGS.values() for m in MOTIONS):
        for dx, dy in torch.randint(-2, 3, (variants, 2), generator=rng).tolist():
            found.append(clip(pictures[thing], motion, dx, dy))
            labels.append(i)
    return torch.stack(found), torch.tensor(labels)
