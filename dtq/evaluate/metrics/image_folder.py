# SPDX-License-Identifier: Apache-2.0
"""Features of a folder of image files, a reference for distribution metrics."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dtq.errors import InputError
from dtq.evaluate.metrics.extractors import Extractor, Features

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_BATCH = 64


def features(folder: Path, extractor: Extractor) -> Features:
    """Features of every image below a folder, in the order of the paths.

    Args:
        folder: with images of one or several sizes; the extractor resizes them.
        extractor: of the features.

    Returns:
        (N, D) by kind.

    Raises:
        InputError: fewer than two images, a file that is no image, or features whose number
            depends on the size of the image.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise InputError(f"{folder}: {len(files)} images; a reference set needs at least 2")
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, len(files), _BATCH):
        images = [_read(file) for file in files[start : start + _BATCH]]
        same = len({image.shape for image in images}) == 1
        for batch in [torch.stack(images)] if same else [image[None] for image in images]:
            for kind, tensor in extractor(batch).items():
                parts[kind].append(tensor)
    if any(len({t.shape[1] for t in tensors}) > 1 for tensors in parts.values()):
        raise InputError(f"{folder}: images of several sizes; {extractor.name} does not resize")
    return {kind: torch.cat(tensors) for kind, tensors in parts.items()}


def _read(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            data = np.asarray(image.convert("RGB"), dtype=np.float32)
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{file}: not an image ({error})") from error
    return torch.from_numpy(data / 255).permute(2, 0, 1)
