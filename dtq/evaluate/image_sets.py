# SPDX-License-Identifier: Apache-2.0
"""Many images or videos of one model, as features: what distribution metrics compare."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
        refused: extractor that cannot take what the model makes, to the reason; it has no features.
    """

    features: dict[str, Tensor]
    bytes: Tensor
    failed: dict[int, str]
    frames: int
    refused: dict[str, str] = field(default_factory=dict)

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
        InputError: the pipeline makes sounds.
    """
    features: dict[str, list[Tensor]] = defaultdict(list)
    batches: list[Tensor] = []
    failed: dict[int, str] = {}
    refused: dict[str, str] = {}
    frames = 1
    for result in run_pipeline(pipeline, requests, settings, only=places):
        batch = shown(result)
        if batch.ndim not in (4, 5):
            raise InputError("distribution metrics compare images or videos, not sounds")
        start = sum(map(len, batches))
        failed |= {places[start + i]: why for i, image in enumerate(batch) if (why := flaw(image))}
        # 8-bit values, as files hold them: the ADM suite then measures the same images
        stored = as_bytes(batch.nan_to_num())
        for name in [each for each in loaded if each not in refused]:
            try:
                found = loaded[name](stored.float() / 255)
            except InputError as error:
                refused[name] = str(error)
                continue
            for kind, tensor in found.items():
                features[f"{name}.{kind}"].append(tensor)
        if stored.ndim == 5:  # all frames of a thousand videos would fill the memory
            frames = stored.shape[1]
            stored = stored[:, frames // 2].clone()
        batches.append(stored)
    joined = {key: torch.cat(features[key]) for key in _without(features, refused)}
    return ImageSet(joined, torch.cat(batches), failed, frames, refused)


def _without(keys: Iterable[str], refused: Mapping[str, str]) -> list[str]:
    """Those of the keys ``<extractor>.<kind>`` that are of other extractors."""
    return [key for key in keys if key.partition(".")[0] not in refused]


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
    plain["refused"] = shard.refused
    gathered = gather(workers, folder, model, tensors, plain)
    if gathered is None:
        return None
    positions = [place for _, plain in gathered for place in plain["places"]]
    check_ids([f"{place:04d}" for place in positions], len(positions))
    order = torch.tensor(positions).argsort()
    refused = {name: why for _, plain in gathered for name, why in plain["refused"].items()}
    keys = _without(tensors, refused)
    merged = {key: torch.cat([held[key] for held, _ in gathered])[order] for key in keys}
    images = merged.pop("")
    failed = {int(i): reason for _, plain in gathered for i, reason in plain["failed"].items()}
    frames = gathered[0][1]["frames"]
    return ImageSet(merged, images, dict(sorted(failed.items())), frames, refused)
