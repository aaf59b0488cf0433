# SPDX-License-Identifier: Apache-2.0
"""What distribution metrics compare the samples of a model with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dtq.errors import InputError
from dtq.evaluate.metrics import adm_suite, reference_folder
from dtq.evaluate.metrics.distributions import DISTRIBUTIONS, ReferenceSet
from dtq.evaluate.metrics.extractors import Extractor, Features

FLOAT_IMAGES = "float model's images"
TRAINING_IMAGES = "training images"


def references(
    metric: str,
    name: str,
    extractor: Extractor,
    floats: Features,
    reference_of: Callable[[str], ReferenceSet | None],
) -> Iterator[tuple[ReferenceSet, Features | None]]:
    """What a metric compares with, and the float model's features for the change from its value.

    Args:
        metric: name in ``DISTRIBUTIONS``.
        name: of the extractor in ``EXTRACTORS``.
        extractor: that computed the features.
        floats: features of the float model's images.
        reference_of: the reference of the user, by extractor; None if there is none.
    """
    row = DISTRIBUTIONS[metric]
    yield ReferenceSet(FLOAT_IMAGES, floats), floats if row.reference_free else None
    if row.reference_free:
        return
    if extractor.real is not None and row.frechet and row.kind == "pool":
        yield ReferenceSet(TRAINING_IMAGES, None, {"pool": extractor.real}), floats
    if (given := reference_of(name)) is not None:
        yield given, floats


def reference_set(
    path: Path | None, loaded: Mapping[str, Extractor], frames: int, name: str
) -> ReferenceSet | None:
    """The ADM npz or folder of images or videos with the features of an extractor.

    Args:
        path: of the user; None if there is none.
        loaded: extractors by name.
        frames: of each sample of the models; 1 for images.
        name: of the extractor.

    Raises:
        InputError: the reference has images and the models make videos, or the reverse; or its
            videos have another number of frames, and the extractor takes whole videos.
    """
    if path is None:
        return None
    extractor = loaded[name]
    if path.is_dir():
        features, lengths = reference_folder.features(path, extractor)
        _check_frames(path, lengths, frames, extractor)
        return ReferenceSet(path.name, features)
    _check_frames(path, {1}, frames, extractor)
    file = adm_suite.read(path)
    if file.images is not None:
        floats = file.images.permute(0, 3, 1, 2).float() / 255
        return ReferenceSet(file.name, extractor(floats))
    if name != "inception":
        raise InputError(f"{file.name} has Inception moments, but the features are of {name}")
    moments = {"pool": file.pool, "spatial": file.spatial}
    return ReferenceSet(file.name, None, {k: m for k, m in moments.items() if m is not None})


def _check_frames(path: Path, lengths: set[int], frames: int, extractor: Extractor) -> None:
    of_videos = max(lengths) > 1
    if of_videos != (frames > 1):
        kinds = ("videos", "images") if of_videos else ("images", "videos")
        raise InputError(f"{path} has {kinds[0]}, and the models make {kinds[1]}")
    if extractor.of_videos and lengths != {frames}:
        found = ", ".join(map(str, sorted(lengths)))
        raise InputError(
            f"{path} has videos of {found} frames, and the models make {frames}; {extractor.name} "
            f"takes whole videos: cut them to {frames} frames"
        )
