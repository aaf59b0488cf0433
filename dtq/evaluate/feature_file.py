# SPDX-License-Identifier: Apache-2.0
"""The features of image sets: a safetensors file next to the run file, which holds its digest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dtq.errors import InputError
from dtq.io.checksum import file_digest
from dtq.io.schema import key

if TYPE_CHECKING:
    from torch import Tensor

FILE = "features.safetensors"

LARGEST = 2**30
"""Bytes; 10,000 images with 2048 features each take 246 MB."""


@dataclass(frozen=True)
class FeatureFile:
    """Images of both models for the same prompts and seeds, from which features were extracted.

    Attributes:
        prompts: prompt or label of each image (N,).
        seed: of the run; image i has the latents of request i.
        extractors: name of an extractor to the network, its file and the resizer.
        extractor_of: requested metric to the name of its extractor.
        file: name of the file with the features, next to the run file.
        sha256: of its contents; empty until it is written.
    """

    prompts: list[str]
    seed: int
    extractors: dict[str, str]
    extractor_of: dict[str, str]
    file: str = field(
        default=FILE,
        metadata=key("", "a plain name", re.compile(r"[\w-][\w.-]*\.safetensors").fullmatch),
    )
    sha256: str = ""


def write(features: Mapping[str, Tensor], path: Path, sets: FeatureFile) -> FeatureFile:
    """Write features (N, D) by ``<side>.<extractor>.<kind>``; returns ``sets`` with digest."""
    from safetensors.torch import save

    from dtq.io.atomic import atomic_write

    atomic_write(path, save({name: t.contiguous() for name, t in features.items()}))
    return replace(sets, file=path.name, sha256=file_digest(path))


def read(folder: Path, sets: FeatureFile) -> dict[str, Tensor]:
    """Read the features of a run.

    Args:
        folder: of the run file.
        sets: what the run file says about them.

    Raises:
        InputError: the file is missing, is too large, or is not the one that the run wrote.
    """
    from safetensors.torch import load_file

    path = folder / sets.file
    if not path.is_file():
        raise InputError(f"{path}: missing; it belongs to the run file")
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: larger than {LARGEST} bytes")
    if file_digest(path) != sets.sha256:
        raise InputError(f"{path}: not the file that the run wrote (its SHA-256 differs)")
    return load_file(path)


def flaws(features: Mapping[str, Tensor], names: Iterable[str], count: int) -> list[str]:
    """Reasons why features cannot be used.

    Args:
        features: (N, D) by name.
        names: that must be there.
        count: N, of sides other than ``rerun``, which may have fewer images.
    """
    import torch

    reasons = []
    for name in names:
        tensor = features.get(name)
        if tensor is None:
            reasons.append(f"{name}: not in the file of features")
        elif tensor.ndim != 2 or tensor.dtype != torch.float32 or not tensor.shape[1]:
            reasons.append(f"{name}: not float32 of two axes")
        elif len(tensor) != count and not (name.startswith("rerun.") and 2 <= len(tensor) < count):
            reasons.append(f"{name}: {len(tensor)} images, the run has {count}")
        elif not tensor.isfinite().all():
            reasons.append(f"{name}: not finite")
    return reasons
