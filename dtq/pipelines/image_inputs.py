# SPDX-License-Identifier: Apache-2.0
"""Pictures that a pipeline's call wants beside the prompt: to edit, to continue, to follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from dtq.errors import InputError
from dtq.pipelines.settings import SamplingSettings

FRAMES = 17
"""Of a clip; one more than a multiple of 4, 8 and 16, as video autoencoders want it."""

_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# a pipeline with one of these in its name is not doing its work without a picture, whatever the
# defaults in its signature say
_WORKS_ON_PICTURES = (
    *("Img2Img", "Inpaint", "Edit", "Kontext", "Fill", "Control", "Refiner", "Layered"),
    *("ImageToVideo", "Image2Video", "I2V", "I2I", "VideoToVideo", "VideoToWorld"),
)


def _mask(picture: Image.Image) -> Image.Image:
    """The middle half of each side is to be changed."""
    mask = Image.new("L", picture.size, 0)
    width, height = picture.size
    mask.paste(255, (width // 4, height // 4, width * 3 // 4, height * 3 // 4))
    return mask


def _clip(picture: Image.Image) -> list[Image.Image]:
    """A window that pans over the picture."""
    width, height = (side * 7 // 8 for side in picture.size)
    left, top = picture.width - width, picture.height - height
    places = [(left * i // (FRAMES - 1), top * i // (FRAMES - 1)) for i in range(FRAMES)]
    return [
        picture.crop((x, y, x + width, y + height)).resize(picture.size, Image.Resampling.BICUBIC)
        for x, y in places
    ]


# argument of a pipeline's call: what it gets of one picture
MAKERS: dict[str, Callable[[Image.Image], object]] = {
    "image": lambda picture: picture,
    "control_image": lambda picture: picture,
    "mask_image": _mask,
    "control_mask": _mask,
    "video": _clip,
    "pose_video": _clip,
    "face_video": _clip,
}


@dataclass(frozen=True)
class ImageInputs:
    """What a pipeline wants beside the prompt, and the pictures that it is made of.

    Attributes:
        arguments: of the call, keys of ``MAKERS``; none: prompts or labels are enough.
        files: pictures to take in turn; without any they are made up.
        size: height and width of a made-up picture.
        seed: of the made-up ones.
    """

    arguments: tuple[str, ...]
    files: tuple[Path, ...] = ()
    size: tuple[int, int] = (512, 512)
    seed: int = 0

    def batch(self, wanted: int) -> int:
        """Requests in one call: pipelines differ in how they pair pictures with prompts."""
        return 1 if self.arguments else wanted

    @property
    def warning(self) -> str:
        """What the user should know; empty when the pictures are given, or none are wanted."""
        if self.files or not self.arguments:
            return ""
        names = " and ".join(self.arguments)
        return f"the pipeline wants {names}: pictures are made up. Give real ones: --images FOLDER"

    def of(self, number: int) -> dict[str, object]:
        """The arguments of a call that makes request ``number``."""
        if not self.arguments:
            return {}
        picture = (
            _opened(self.files[number % len(self.files)])
            if self.files
            else dummy_images(self.size, self.seed * 1_000_003 + number)
        )
        return {name: MAKERS[name](picture) for name in self.arguments}


def wanted(pipeline: Any, settings: SamplingSettings) -> ImageInputs:
    """What the calls of a pipeline need.

    Raises:
        InputError: ``calibration.images`` has no pictures, or the pipeline takes none; or a picture
            is given as text among ``calibration.arguments``.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    takes = [name for name in MAKERS if name in parameters]
    needs = [name for name in takes if parameters[name].default is inspect.Parameter.empty]
    kind = type(pipeline).__name__
    if settings.images or any(word in kind for word in _WORKS_ON_PICTURES):
        # of a picture and a clip the first will do
        needs = [name for name in takes if name != "video" or "image" not in takes or name in needs]
    if settings.images and not takes:
        raise InputError(f"calibration.images: {kind} takes no pictures")
    given = settings.pipeline_args
    for name in takes:
        if isinstance(given.get(name), str):
            raise InputError(f"calibration.arguments: {name} is a picture; give it with --images")
    needs = [name for name in needs if name not in given]
    if not needs:
        return ImageInputs(())
    files = _listed(Path(settings.images)) if settings.images else ()
    size = int(given.get("height", 512)), int(given.get("width", 512))
    return ImageInputs(tuple(needs), files, size, settings.seed)


def dummy_images(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth colours with detail at every scale: the spectrum of photographs, about 1/f.

    Args:
        size: height and width.
        seed: of the colours.
    """
    rng = torch.Generator().manual_seed(seed)
    picture = torch.zeros(1, 3, *size)
    cells = 2
    while cells <= max(size):
        noise = torch.randn(1, 3, cells, cells, generator=rng)
        picture += F.interpolate(noise, size, mode="bilinear", align_corners=False) / cells**0.8
        cells *= 2
    low, high = picture.amin((2, 3), keepdim=True), picture.amax((2, 3), keepdim=True)
    data = ((picture - low) / (high - low) * 255).round().to(torch.uint8)
    return Image.fromarray(data[0].permute(1, 2, 0).contiguous().numpy())


def _listed(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise InputError(f"calibration.images: {path}: no such file or folder")
    found = tuple(sorted(p for p in path.iterdir() if p.suffix.lower() in _FILES))
    if not found:
        raise InputError(f"calibration.images: no {', '.join(_FILES)} files in {path}")
    return found


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"calibration.images: {path}: no picture ({error})") from error
