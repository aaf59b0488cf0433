# SPDX-License-Identifier: Apache-2.0
"""Image inputs of a pipeline call: images to edit or extend, masks, control images and clips."""

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
from dtq.pipelines.settings import SamplingSettings, seed_of

FRAMES = 17
"""Frames of a clip; one more than a multiple of 4, 8 and 16, as video autoencoders require."""

_IMAGES = "images (--images, or calibration.images in a recipe)"
_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# the class name of a pipeline that needs an image for its task, even if the image is optional in
# the signature of its call
_TASKS_WITH_IMAGES = (
    *("Img2Img", "Inpaint", "Edit", "Kontext", "Fill", "Control", "Refiner", "Layered"),
    *("ImageToVideo", "Image2Video", "I2V", "I2I", "VideoToVideo", "VideoToWorld"),
)


def _mask(image: Image.Image) -> Image.Image:
    """A mask that selects the middle half of each side."""
    mask = Image.new("L", image.size, 0)
    width, height = image.size
    mask.paste(255, (width // 4, height // 4, width * 3 // 4, height * 3 // 4))
    return mask


def _clip(image: Image.Image) -> list[Image.Image]:
    """A clip of a window that pans over the image."""
    width, height = (side * 7 // 8 for side in image.size)
    left, top = image.width - width, image.height - height
    corners = [(left * i // (FRAMES - 1), top * i // (FRAMES - 1)) for i in range(FRAMES)]
    return [
        image.crop((x, y, x + width, y + height)).resize(image.size, Image.Resampling.BICUBIC)
        for x, y in corners
    ]


# argument of a pipeline call: how to make it from one image
MAKERS: dict[str, Callable[[Image.Image], object]] = {
    **dict.fromkeys(("image", "control_image"), lambda image: image),
    **dict.fromkeys(("mask_image", "control_mask"), _mask),
    **dict.fromkeys(("video", "pose_video", "face_video"), _clip),
}


@dataclass(frozen=True)
class ImageInputs:
    """The image arguments of a pipeline call, and the images that they are made from.

    Attributes:
        arguments: names of the arguments, keys of ``MAKERS``; empty: prompts or labels are enough.
        files: images to use in turn; empty: random images.
        size: height and width of a random image, in pixels.
        seed: seed of the random images.
    """

    arguments: tuple[str, ...]
    files: tuple[Path, ...] = ()
    size: tuple[int, int] = (512, 512)
    seed: int = 0

    def batch(self, batch_size: int) -> int:
        """Requests per call; 1 with images, since pipelines pair images and prompts differently."""
        return 1 if self.arguments else batch_size

    @property
    def warning(self) -> str:
        """A warning that the images are random; empty if they are given, or none are needed."""
        if self.files or not self.arguments:
            return ""
        names = " and ".join(self.arguments)
        return (
            f"the pipeline needs {names}: random images are used. Give real ones: --images FOLDER"
        )

    def of(self, index: int) -> dict[str, object]:
        """The image arguments of the call for request ``index``."""
        if not self.arguments:
            return {}
        if self.files:
            image = _read_image(self.files[index % len(self.files)])
        else:
            image = random_image(self.size, seed_of(self.seed, index))
        return {name: MAKERS[name](image) for name in self.arguments}


def required(pipeline: Any, settings: SamplingSettings) -> ImageInputs:
    """The image inputs that calls of a pipeline need.

    Raises:
        InputError: ``settings.images`` has no images, or the pipeline takes none; or
            ``settings.pipeline_args`` gives an image as text.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    accepted = [name for name in MAKERS if name in parameters]
    needed = [name for name in accepted if parameters[name].default is inspect.Parameter.empty]
    kind = type(pipeline).__name__
    if settings.images or any(word in kind for word in _TASKS_WITH_IMAGES):
        # of an image and a clip, the image is enough
        needed = [n for n in accepted if n != "video" or "image" not in accepted or n in needed]
    if settings.images and not accepted:
        raise InputError(f"{_IMAGES}: {kind} takes no images")
    args = settings.pipeline_args
    for name in accepted:
        if isinstance(args.get(name), str):
            raise InputError(
                f"{name} is an image: give it with --images, not with --arg or pipeline_args"
            )
    needed = [name for name in needed if name not in args]
    if not needed:
        return ImageInputs(())
    files = _image_files(Path(settings.images)) if settings.images else ()
    size = int(args.get("height", 512)), int(args.get("width", 512))
    return ImageInputs(tuple(needed), files, size, settings.seed)


def random_image(size: tuple[int, int], seed: int) -> Image.Image:
    """A smooth random image with detail at every scale: a spectrum of about 1/f, like photographs.

    Args:
        size: height and width in pixels.
        seed: seed of the colors.
    """
    rng = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, *size)
    cells = 2
    while cells <= max(size):
        noise = torch.randn(1, 3, cells, cells, generator=rng)
        image += F.interpolate(noise, size, mode="bilinear", align_corners=False) / cells**0.8
        cells *= 2
    low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
    data = ((image - low) / (high - low) * 255).round().to(torch.uint8)
    return Image.fromarray(data[0].permute(1, 2, 0).contiguous().numpy())


def _image_files(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise InputError(f"{_IMAGES}: {path}: no such file or folder")
    files = tuple(sorted(p for p in path.iterdir() if p.suffix.lower() in _FILES))
    if not files:
        raise InputError(f"{_IMAGES}: no {', '.join(_FILES)} files in {path}")
    return files


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{_IMAGES}: {path}: not an image ({error})") from error
