# SPDX-License-Identifier: Apache-2.0
"""Same-seed comparison of finished pictures, and contact sheets."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def psnr(got: Tensor, want: Tensor) -> Tensor:
    """PSNR in dB per picture (B,), float pictures (B, 3, H, W) in [0, 1]; equal ones give inf."""
    error = (got.double() - want.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def ssim(got: Tensor, want: Tensor) -> Tensor:
    """Structural similarity per picture (B,), float pictures (B, 3, H, W) in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(got, want, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(-1)


def as_image(picture: Tensor) -> Image.Image:
    """A PIL image of a float picture (3, H, W) in [0, 1]."""
    data = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(data.permute(1, 2, 0).contiguous().numpy())


def save(made: Tensor, stem: Path, rate: int = 44100) -> Path:
    """Write a picture (3, H, W), a video (F, 3, H, W), or a sound (channels, samples).

    Args:
        made: pictures and videos in [0, 1], sounds in [-1, 1].
        stem: path without suffix.
        rate: samples of a sound in a second.

    Returns:
        The file: ``.png``, an animated ``.webp`` of 8 frames a second, or ``.wav``.
    """
    if made.ndim == 3:
        path = stem.with_name(f"{stem.name}.png")
        as_image(made).save(path)
    elif made.ndim == 4:
        path = stem.with_name(f"{stem.name}.webp")
        first, *rest = [as_image(frame) for frame in made]
        first.save(path, save_all=True, append_images=rest, duration=125, loop=0, quality=90)
    else:
        path = stem.with_name(f"{stem.name}.wav")
        data = (made.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous()
        with wave.open(str(path), "wb") as file:
            file.setnchannels(len(made))
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(data.numpy().tobytes())
    return path


def sheet(rows: list[Tensor], gap: int = 4, scale: int = 1) -> Image.Image:
    """Rows of pictures, each (B, 3, H, W) in [0, 1], as one image on white."""
    columns = max(len(row) for row in rows)
    height, width = (rows[0].shape[-2] * scale, rows[0].shape[-1] * scale)
    page = Image.new(
        "RGB", (columns * (width + gap) + gap, len(rows) * (height + gap) + gap), "white"
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            image = as_image(picture).resize((width, height), Image.Resampling.NEAREST)
            page.paste(image, (gap + x * (width + gap), gap + y * (height + gap)))
    return page


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()
