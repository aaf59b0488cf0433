# SPDX-License-Identifier: Apache-2.0
"""The training data of ``demo-video``: short clips of one moving emoji, each with a caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FRAMES, SIZE = 8, 64
_TRAVEL = 12  # pixels to either side of the center
_SIZE = 0.58  # usual size of the emoji, as a share of the side of the frame

# words in a caption: short name in emoji.json
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

# words in a caption: position at a time from -1 to 1. A position is x and y in pixels, right of and
# below the center; the side as a share of the side of the frame; and degrees counterclockwise
Position = tuple[float, float, float, float]
MOTIONS: dict[str, Callable[[float], Position]] = {
    "moves left": lambda t: (-_TRAVEL * t, 0, _SIZE, 0),
    "moves right": lambda t: (_TRAVEL * t, 0, _SIZE, 0),
    "moves up": lambda t: (0, -_TRAVEL * t, _SIZE, 0),
    "moves down": lambda t: (0, _TRAVEL * t, _SIZE, 0),
    "grows": lambda t: (0, 0, _SIZE + 0.3 * t, 0),
    "shrinks": lambda t: (0, 0, _SIZE - 0.3 * t, 0),
    "turns": lambda t: (0, 0, _SIZE, 90 * (t + 1)),
    "stands still": lambda t: (0, 0, _SIZE, 0),
}


def captions() -> list[str]:
    """Every thing with every motion; the motion changes fastest."""
    return [f"{thing} {motion}" for thing in THINGS for motion in MOTIONS]


def clip(image: Image.Image, motion: str, dx: int = 0, dy: int = 0) -> Tensor:
    """Draw a moving image with transparency on a white background.

    Args:
        image: RGBA.
        motion: a key of ``MOTIONS``.
        dx: shift of the whole path to the right, in pixels.
        dy: shift of the whole path downwards, in pixels.

    Returns:
        uint8 (FRAMES, 3, SIZE, SIZE).
    """
    frames = []
    for i in range(FRAMES):
        x, y, share, angle = MOTIONS[motion](2 * i / (FRAMES - 1) - 1)
        rotated = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        side = round(SIZE * share * rotated.width / image.width)
        thing = rotated.resize((side, side), Image.Resampling.LANCZOS)
        frame = Image.new("RGBA", (SIZE, SIZE), "white")
        corner = round((SIZE - side) / 2 + x) + dx, round((SIZE - side) / 2 + y) + dy
        frame.paste(thing, corner, thing)
        frames.append(torch.from_numpy(np.array(frame.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(frames)


def clips(images: Mapping[str, Image.Image], variants: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips of every caption, ``variants`` of each with slightly different positions.

    Args:
        images: RGBA, by short name.
        variants: clips per caption.
        seed: of the shifts.

    Returns:
        uint8 (N, FRAMES, 3, SIZE, SIZE), and int64 (N,): indices into :func:`captions`.
    """
    rng = torch.Generator().manual_seed(seed)
    result, labels = [], []
    for i, (thing, motion) in enumerate((t, m) for t in THINGS.values() for m in MOTIONS):
        for dx, dy in torch.randint(-2, 3, (variants, 2), generator=rng).tolist():
            result.append(clip(images[thing], motion, dx, dy))
            labels.append(i)
    return torch.stack(result), torch.tensor(labels)
