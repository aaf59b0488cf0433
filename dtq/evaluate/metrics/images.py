# SPDX-License-Identifier: Apache-2.0
"""Same-seed comparison of finished pictures, and contact sheets."""

from __future__ import annotations

import io
import wave
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dtq.errors import InputError


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


def flaw(picture: Tensor) -> str:
    """Why a picture or video is none: not finite, or one grey level everywhere. Else empty.

    Args:
        picture: float, any shape, in [0, 1] where it is right.
    """
    if not torch.isfinite(picture).all():
        return "numbers that are not finite"
    if float(picture.max() - picture.min()) < 1 / 255:
        return "an empty picture"
    return ""


def shown(result: Any) -> Tensor:
    """What a pipeline made, float on the CPU.

    Returns:
        Pictures (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], or sounds (B, channels, samples).

    Raises:
        InputError: it returned none of these.
    """
    for kind in ("images", "frames", "audios"):
        if hasattr(result, kind):
            made = torch.as_tensor(getattr(result, kind)).detach().float().cpu()
            return made if kind == "audios" else made.clamp(0, 1)
    raise InputError(f"{type(result).__name__}: neither images, frames nor audios")


def rate(pipeline: Any) -> int:
    """Samples of a sound in a second, as the autoencoder of a pipeline says."""
    config = getattr(getattr(pipeline, "vae", None), "config", {})
    return int(config.get("sampling_rate", 44100))


def strip(video: Tensor, count: int = 8) -> Tensor:
    """At most ``count`` frames of a video (F, 3, H, W), first and last among them."""
    places = torch.linspace(0, len(video) - 1, min(count, len(video))).round().long()
    return video[places]


def as_bytes(shown: Tensor) -> Tensor:
    """8-bit values as a file would hold them: uint8, same shape, from float in [0, 1]."""
    return (shown.clamp(0, 1) * 255).round().to(torch.uint8)


def as_image(picture: Tensor) -> Image.Image:
    """A PIL image of a float picture (3, H, W) in [0, 1]."""
    return Image.fromarray(as_bytes(picture).permute(1, 2, 0).contiguous().numpy())


def encoded(made: Tensor, rate: int = 44100) -> tuple[str, bytes]:
    """A picture (3, H, W), a video (F, 3, H, W) or a sound (channels, samples) as a file.

    Args:
        made: pictures and videos in [0, 1], sounds in [-1, 1].
        rate: samples of a sound in a second.

    Returns:
        Its suffix and its bytes: ``.png``, animated for a video, or ``.wav``.
    """
    if made.ndim > 2:
        return ".png", file(made)
    stream = io.BytesIO()
    data = (made.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous()
    with wave.open(stream, "wb") as wav:
        wav.setnchannels(len(made))
        wav.setsampwidth(2)
        wav.setframerate(rate)
        wav.writeframes(data.numpy().tobytes())
    return ".wav", stream.getvalue()


def file(shown: Tensor, longest: int | None = None, milliseconds: int = 125) -> bytes:
    """A PNG file of a picture, an animated one of a video.

    Args:
        shown: float (3, H, W), or (F, 3, H, W), in [0, 1].
        longest: pixels of the longer side, when it is to be smaller.
        milliseconds: that a frame stays.
    """
    frames = shown.nan_to_num().clamp(0, 1)
    frames = frames if frames.ndim == 4 else frames[None]
    largest = max(frames.shape[-2:])
    if longest is not None and largest > longest:
        size = [max(1, round(side * longest / largest)) for side in frames.shape[-2:]]
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    images = [as_image(frame) for frame in frames]
    more: dict[str, Any] = {}
    if len(images) > 1:
        more = {"save_all": True, "append_images": images[1:], "duration": milliseconds, "loop": 0}
    stream = io.BytesIO()
    images[0].save(stream, "PNG", optimize=True, **more)
    return stream.getvalue()


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
