# SPDX-License-Identifier: Apache-2.0
"""Metrics of pairs of images, image files, and contact sheets."""

from __future__ import annotations

import io
import wave
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dtq.errors import InputError


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """PSNR in dB per image (B,), float images (B, 3, H, W) in [0, 1]; inf for equal images."""
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity per image (B,), float images (B, 3, H, W) in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(-1)


def color_shift(images: Tensor, reference: Tensor) -> Tensor:
    """Change of the colors of each image (B,), float images (B, 3, H, W) in [0, 1].

    Mean and standard deviation of brightness and of the two color differences (YCbCr, ITU-R BT.601)
    are taken over the pixels. The value is the root mean square of the six differences, in gray
    levels of 255. Brightness, contrast, saturation and tint change it; shapes and places do not.
    """
    return 255 * (_color_moments(images) - _color_moments(reference)).square().mean(1).sqrt()


def _color_moments(images: Tensor) -> Tensor:
    """Means and standard deviations of Y, Cb and Cr: float64 (B, 6)."""
    red, green, blue = images.double().flatten(2).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    channels = torch.stack([luma, (blue - luma) / 1.772, (red - luma) / 1.402], dim=1)
    return torch.cat([channels.mean(2), channels.std(2, correction=0)], dim=1)


def flaw(image: Tensor) -> str:
    """Why an image or video cannot be used, as the end of a sentence; empty if it can.

    Args:
        image: float, any shape; a usable one is in [0, 1].
    """
    if not torch.isfinite(image).all():
        return "has values that are not finite"
    if float(image.max() - image.min()) < 1 / 255:
        return "is empty: it has less than one gray level of contrast"
    return ""


def shown(result: Any) -> Tensor:
    """The output of a pipeline, float on the CPU.

    Returns:
        Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], or sounds (B, channels, samples).

    Raises:
        InputError: the pipeline returned none of these.
    """
    for kind in ("images", "frames", "audios"):
        if hasattr(result, kind):
            output = torch.as_tensor(getattr(result, kind)).detach().float().cpu()
            if kind == "audios":  # AudioLDM leaves out the axis of its one channel
                return output[:, None] if output.ndim == 2 else output
            return output.clamp(0, 1)
    raise InputError(f"{type(result).__name__}: has neither images, frames nor audios")


def rate(pipeline: Any) -> int:
    """Sampling rate of sounds in Hz, from the config of the pipeline's vocoder or autoencoder."""
    for name in ("vocoder", "vae"):
        config = getattr(getattr(pipeline, name, None), "config", None)
        names = ("sampling_rate", "sample_rate")
        if found := next(filter(None, (getattr(config, n, None) for n in names)), None):
            return int(found)
    return 44100


def strip(video: Tensor, count: int = 8) -> Tensor:
    """At most ``count`` frames of a video (F, 3, H, W), the first and the last among them."""
    places = torch.linspace(0, len(video) - 1, min(count, len(video))).round().long()
    return video[places]


def as_bytes(images: Tensor) -> Tensor:
    """8-bit values as in a file: uint8 of the same shape, from float in [0, 1]."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def as_image(image: Tensor) -> Image.Image:
    """A PIL image of a float image (3, H, W) in [0, 1]."""
    return Image.fromarray(as_bytes(image).permute(1, 2, 0).contiguous().numpy())


def encoded(sample: Tensor, rate: int = 44100) -> tuple[str, bytes]:
    """Encode an image (3, H, W), a video (F, 3, H, W) or a sound (channels, samples).

    Args:
        sample: images and videos in [0, 1], sounds in [-1, 1].
        rate: sampling rate of a sound in Hz.

    Returns:
        Suffix and contents of the file: ``.png``, animated for a video, or ``.wav``.
    """
    if sample.ndim > 2:
        return ".png", file(sample)
    stream = io.BytesIO()
    data = (sample.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous()
    with wave.open(stream, "wb") as wav:
        wav.setnchannels(len(sample))
        wav.setsampwidth(2)
        wav.setframerate(rate)
        wav.writeframes(data.numpy().tobytes())
    return ".wav", stream.getvalue()


def file(image: Tensor, longest: int | None = None, milliseconds: int = 125) -> bytes:
    """A PNG file of an image, or an animated PNG file of a video.

    Args:
        image: float (3, H, W), or (F, 3, H, W), in [0, 1].
        longest: largest number of pixels of the longer side; larger images are scaled down.
        milliseconds: duration of a frame.
    """
    frames = image.nan_to_num().clamp(0, 1)
    frames = frames if frames.ndim == 4 else frames[None]
    largest = max(frames.shape[-2:])
    if longest is not None and largest > longest:
        size = [max(1, round(side * longest / largest)) for side in frames.shape[-2:]]
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    images = [as_image(frame) for frame in frames]
    more: dict[str, Any] = {}
    if len(images) > 1:
        more = {"save_all": True, "append_images": images[1:], "duration": milliseconds, "loop": 0}
    return png(images[0], **more)


def sheet(rows: list[Tensor], gap: int = 4, scale: int = 1) -> Image.Image:
    """A contact sheet on white.

    Args:
        rows: images of each row, (B, 3, H, W) in [0, 1], all of one size.
        gap: pixels between images.
        scale: factor of the size of the images.
    """
    columns = max(len(row) for row in rows)
    height, width = (rows[0].shape[-2] * scale, rows[0].shape[-1] * scale)
    size = columns * (width + gap) + gap, len(rows) * (height + gap) + gap
    page = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            cell = as_image(image).resize((width, height), Image.Resampling.NEAREST)
            page.paste(cell, (gap + x * (width + gap), gap + y * (height + gap)))
    return page


def png(image: Image.Image, **options: Any) -> bytes:
    """The image as a PNG file; the options are those of PIL."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True, **options)
    return stream.getvalue()
