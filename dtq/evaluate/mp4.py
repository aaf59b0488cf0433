# SPDX-License-Identifier: Apache-2.0
"""MP4 files of videos, by imageio and the ffmpeg that its package brings (``dtq[video]``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtq.errors import InputError, first_line
from dtq.evaluate import optional_packages
from dtq.evaluate.metrics.images import as_bytes

FRAMES_PER_SECOND = 8
"""Of the videos of ``dtq eval``; pipelines do not say their rate."""


def write(video: Tensor, path: Path, fps: int = FRAMES_PER_SECOND, lossless: bool = False) -> None:
    """Write a video as H.264.

    Args:
        video: float (F, 3, H, W) in [0, 1].
        path: file, replaced if it is there.
        fps: frames per second.
        lossless: RGB without loss, for tools that measure the frames, as VBench does; many players
            cannot show it. By default YUV 4:2:0, which all players show. Sides must then be even,
            so the last row or column is repeated if they are odd.

    Raises:
        InputError: the extra ``dtq[video]`` is not installed.
    """
    imageio = _imageio()
    if not lossless:
        height, width = video.shape[-2:]
        video = F.pad(video, (0, width % 2, 0, height % 2), mode="replicate")
    options: dict[str, Any] = {"codec": "libx264", "pixelformat": "yuv420p"}
    if lossless:
        options = {"codec": "libx264rgb", "pixelformat": "rgb24"}
    quality = ["-crf", "0" if lossless else "16"]
    with imageio.get_writer(
        str(path), format="FFMPEG", fps=fps, macro_block_size=1, output_params=quality,
        ffmpeg_log_level="error", quality=None, **options,
    ) as writer:  # fmt: skip
        for frame in as_bytes(video).permute(0, 2, 3, 1).contiguous().numpy():
            writer.append_data(frame)


def read(path: Path) -> Tensor:
    """The frames of a video file, uint8 (F, 3, H, W).

    Raises:
        InputError: ``dtq[video]`` is not installed, or the file is not a video.
    """
    imageio = _imageio()
    try:
        with imageio.get_reader(str(path), format="FFMPEG") as reader:
            frames = [torch.from_numpy(frame.copy()) for frame in reader]
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(f"{path}: not a video ({first_line(error)})") from error
    if not frames:
        raise InputError(f"{path}: a video without frames; remove it or copy it again")
    return torch.stack(frames).permute(0, 3, 1, 2)


def _imageio() -> Any:
    optional_packages.need("imageio_ffmpeg", "dtq[video]")
    return optional_packages.need("imageio.v2", "dtq[video]")
