# SPDX-License-Identifier: Apache-2.0
"""Many images of one model, as features: what distribution metrics compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
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
    """Images of one model and their features.

    Attributes:
        features: by extractor.
        bytes: uint8 (N, 3, H, W).
        failed: position of an image that cannot be used, to the reason.
    """

    features: dict[str, Features]
    bytes: Tensor
    failed: dict[int, str]

    @property
    def images(self) -> Tensor:
        """Float (N, 3, H, W) in [0, 1]."""
        return self.bytes.float() / 255

    def tensors(self) -> dict[str, Tensor]:
        """Features (N, D) by ``<extractor>.<kind>``."""
        return {f"{n}.{k}": t for n, kinds in self.features.items() for k, t in kinds.items()}

    def save(self, file: Path) -> None:
        """Write :meth:`tensors` as safetensors, for metrics that are computed later."""
        save_file(self.tensors(), file)


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
        InputError: the pipeline makes videos or sounds.
    """
    features: dict[str, list[Features]] = {name: [] for name in loaded}
    batches: list[Tensor] = []
    failed: dict[int, str] = {}
    for result in run_pipeline(pipeline, requests, settings, only=places):
        batch = shown(result)
        if batch.ndim != 4:
            raise InputError(
                "distribution metrics compare images; this pipeline makes videos or sounds"
            )
        start = sum(map(len, batches))
        failed |= {places[start + i]: why for i, image in enumerate(batch) if (why := flaw(image))}
        # 8-bit values, as files hold them: the ADM suite then measures the same images
        batches.append(as_bytes(batch.nan_to_num()))
        for name, extractor in loaded.items():
            features[name].append(extractor(batches[-1].float() / 255))
    joined = {
        name: {key: torch.cat([f[key] for f in parts]) for key in parts[0]}
        for name, parts in features.items()
    }
    return ImageSet(joined, torch.cat(batches), failed)


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
    tensors = {**shard.tensors(), "": shard.bytes}
    gathered = gather(workers, folder, model, tensors, {"places": places, "failed": shard.failed})
    if gathered is None:
        return None
    positions = [place for _, plain in gathered for place in plain["places"]]
    check_ids([f"{place:04d}" for place in positions], len(positions))
    order = torch.tensor(positions).argsort()
    merged = {key: torch.cat([held[key] for held, _ in gathered])[order] for key in tensors}
    features = {
        name: {kind: merged[f"{name}.{kind}"] for kind in kinds}
        for name, kinds in shard.features.items()
    }
    failed = {int(i): reason for _, plain in gathered for i, reason in plain["failed"].items()}
    return ImageSet(features, merged[""], dict(sorted(failed.items())))
