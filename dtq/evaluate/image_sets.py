# SPDX-License-Identifier: Apache-2.0
"""Many images or videos of one model, as features: what distribution metrics compare."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtq.errors import InputError
from dtq.evaluate.metrics.extractors import Extractor, Features
from dtq.evaluate.metrics.images import as_bytes, flaw, shown
from dtq.pipelines import prompts
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings
from dtq.runs.gather import check_ids, gather
from dtq.runs.workers import Workers


@dataclass
class ImageSet:
    """Images or videos of one model and their features.

    Attributes:
        features: (N, D) by ``<extractor>.<kind>``.
        bytes: uint8 (N, 3, H, W); the middle frame of a video.
        failed: position of an image that cannot be used, to the reason.
        frames: of each video; 1 for images.
    """

    features: dict[str, Tensor]
    bytes: Tensor
    failed: dict[int, str]
    frames: int

    @property
    def images(self) -> Tensor:
        """Float (N, 3, H, W) in [0, 1]."""
        return self.bytes.float() / 255

    def features_of(self, extractor: str) -> Features:
        """Features of one extractor, by kind."""
        prefix = f"{extractor}."
        return {k.removeprefix(prefix): t for k, t in self.features.items() if k.startswith(prefix)}


@torch.no_grad()
def image_set(
    pipeline: Any,
    requests: prompts.Requests,
    settings: SamplingSettings,
    loaded: Mapping[str, Extractor],
    places: Sequence[int],
) -> ImageSet:
    """Sample a pipeline at some positions of the requests, and extract features batch by batch.

    Args:
        pipeline: of diffusers.
        requests: prompts or labels.
        settings: steps, guidance, seed and batch size.
        loaded: extractors by name.
        places: positions in ``requests``, in whole batches.

    Raises:
        InputError: the pipeline makes sounds, or an extractor cannot take what it makes.
    """
    features: dict[str, list[Tensor]] = defaultdict(list)
    batches: list[Tensor] = []
    failed: dict[int, str] = {}
    frames = 1
    for result in run_pipeline(pipeline, requests, settings, only=places):
        batch = shown(result)
        if batch.ndim not in (4, 5):
            raise InputError("distribution metrics compare images or videos, not sounds")
        start = sum(map(len, batches))
        failed |= {places[start + i]: why for i, image in enumerate(batch) if (why := flaw(image))}
        # 8-bit values, as files hold them: the ADM suite then measures the same images
        stored = as_bytes(batch.nan_to_num())
        for name, extractor in loaded.items():
            for kind, tensor in extractor(stored.float() / 255).items():
                features[f"{name}.{kind}"].append(tensor)
        if stored.ndim == 5:  # all frames of a thousand videos would fill the memory
            frames = stored.shape[1]
            stored = stored[:, frames // 2].clone()
        batches.append(stored)
    joined = {key: torch.cat(parts) for key, parts in features.items()}
    return ImageSet(joined, torch.cat(batches), failed, frames)


def gather_images(
    workers: Workers, folder: Path | None, model: str, shard: ImageSet, places: Sequence[int]
) -> ImageSet | None:
    """Merge the image sets of all processes, in the order of the requests.

    Args:
        workers: the processes.
        folder: through which they exchange files; one process needs none.
        model: ``float`` or ``candidate``, part of the file name.
        shard: the images of this process.
        places: their positions in the requests.

    Returns:
        All images in the main process, None in the others.

    Raises:
        WorkerError: an image is missing or duplicated.
    """
    tensors = {**shard.features, "": shard.bytes}
    plain = {"places": places, "failed": shard.failed, "frames": shard.frames}
    gathered = gather(workers, folder, model, tensors, plain)
    if gathered is None:
        return None
    positions = [place for _, plain in gathered for place in plain["places"]]
    check_ids([f"{place:04d}" for place in positions], len(positions))
    order = torch.tensor(positions).argsort()
    merged = {key: torch.cat([held[key] for held, _ in gathered])[order] for key in tensors}
    images = merged.pop("")
    failed = {int(i): reason for _, plain in gathered for i, reason in plain["failed"].items()}
    return ImageSet(merged, images, dict(sorted(failed.items())), gathered[0][1]["frames"])
