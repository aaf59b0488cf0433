# SPDX-License-Identifier: Apache-2.0
"""Features of a folder of image or video files, a reference for distribution metrics."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dtq.errors import InputError
from dtq.evaluate import mp4
from dtq.evaluate.metrics.extractors import Extractor, Features

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".avi", ".gif", ".mkv", ".mov", ".webm")

_BATCH = 64


def features(folder: Path, extractor: Extractor) -> tuple[Features, set[int]]:
    """Features of every image or every video below a folder, in the order of the paths.

    Args:
        folder: with images or videos of one or several sizes; the extractor resizes them.
        extractor: of the features.

    Returns:
        (N, D) by kind, one row for each file; and the numbers of frames of the files, 1 for images.

    Raises:
        InputError: fewer than two files, images and videos in one folder, a damaged file, features
            whose number depends on the size of the image, or ``dtq[video]`` is not installed.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES + VIDEOS)
    of_videos = {file.suffix.lower() in VIDEOS for file in files}
    if len(of_videos) > 1:
        raise InputError(f"{folder}: has images and videos; a reference set is of one kind")
    if len(files) < 2:
        raise InputError(f"{folder}: {len(files)} images or videos; a reference set needs 2")
    read, count = (_video, 1) if True in of_videos else (_image, _BATCH)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    frames = set()
    for start in range(0, len(files), count):
        samples = [read(file) for file in files[start : start + count]]
        frames |= {len(sample) if sample.ndim == 4 else 1 for sample in samples}
        same = len({sample.shape for sample in samples}) == 1
        for batch in [torch.stack(samples)] if same else [sample[None] for sample in samples]:
            for kind, tensor in extractor(batch).items():
                parts[kind].append(tensor)
    if any(len({t.shape[1] for t in tensors}) > 1 for tensors in parts.values()):
        raise InputError(f"{folder}: files of several sizes; {extractor.name} does not resize")
    return {kind: torch.cat(tensors) for kind, tensors in parts.items()}, frames


def _video(file: Path) -> Tensor:
    return mp4.read(file).float() / 255


def _image(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            data = np.asarray(image.convert("RGB"), dtype=np.float32)
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{file}: not an image ({error})") from error
    return torch.from_numpy(data / 255).permute(2, 0, 1)
