# SPDX-License-Identifier: Apache-2.0
"""The features of image sets: a safetensors file next to the run file, which holds its digest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dtq.errors import LIBRARY_ERRORS, InputError
from dtq.evaluate.gate.metrics import MIN_IMAGES
from dtq.io.checksum import bytes_digest, file_digest
from dtq.io.schema import key

if TYPE_CHECKING:
    from torch import Tensor

FILE = "features.safetensors"

LARGEST = 2**32
"""Bytes; 50,000 images of both models with 2048 features take 0.8 GB."""


@dataclass(frozen=True)
class FeatureFile:
    """Images of both models for the same prompts and seeds, from which features were extracted.

    Attributes:
        prompts: prompt or label of each image (N,).
        seed: of the run; image i has the latents of request i.
        extractors: name of an extractor to the digest of its weights and the resizer.
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
        metadata=key("", "a plain name", re.compile(r"[^/\\\0.][^/\\\0]*\.safetensors").fullmatch),
    )
    sha256: str = ""

    def extractor(self, metric: str) -> str:
        """What computed the features of a metric: name, weights and resizer."""
        name = self.extractor_of.get(metric, "none")
        return f"{name} ({self.extractors.get(name, 'unknown')})"


def write(
    features: Mapping[str, Tensor], folder: Path, sets: FeatureFile, file: str = FILE
) -> FeatureFile:
    """Write features, atomically.

    Args:
        features: (N, D) by ``<side>.<extractor>.<kind>``.
        folder: of the run file.
        sets: what the run file says about them.
        file: name; ``{digest}`` in it is replaced by the first digits of the SHA-256.

    Returns:
        ``sets`` with the name and the digest of the file.
    """
    from safetensors.torch import save

    from dtq.io.atomic import atomic_write

    data = save({name: tensor.contiguous() for name, tensor in features.items()})
    digest = bytes_digest(data)
    name = file.replace("{digest}", digest[:12])
    atomic_write(folder / name, data)
    return replace(sets, file=name, sha256=digest)


def read(folder: Path, sets: FeatureFile) -> dict[str, Tensor]:
    """Read the features of a run.

    Args:
        folder: of the run file.
        sets: what the run file says about them.

    Raises:
        InputError: the file is missing, is too large, or is not the one that the run wrote.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / sets.file
    advice = "copy the file that belongs to the run file, or run dtq eval again"
    if not path.is_file():
        raise InputError(f"{path}: missing; {advice}")
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: larger than {LARGEST} bytes; evaluate fewer images")
    if file_digest(path) != sets.sha256:
        raise InputError(f"{path}: its SHA-256 is not the one in the run file; {advice}")
    try:
        return load_file(path)
    except (SafetensorError, *LIBRARY_ERRORS) as error:
        raise InputError(f"{path}: not safetensors ({error}); {advice}") from error


def flaws(features: Mapping[str, Tensor], names: Iterable[str], count: int) -> list[str]:
    """Reasons why features cannot be used.

    Args:
        features: (N, D) by name.
        names: of the sides that are compared with one another.
        count: N, of sides other than ``rerun``, which may have fewer images.
    """
    import torch

    reasons, widths = [], set()
    for name in names:
        tensor = features.get(name)
        if tensor is None:
            reasons.append(f"{name}: not in the file of features")
            continue
        least = min(count, MIN_IMAGES) if name.startswith("rerun.") else count
        if tensor.ndim != 2 or tensor.dtype != torch.float32 or not tensor.shape[1]:
            reasons.append(f"{name}: not float32 of two axes")
        elif not least <= len(tensor) <= count:
            reasons.append(f"{name}: {len(tensor)} images, the run has {count}")
        elif not tensor.isfinite().all():
            reasons.append(f"{name}: not finite")
        elif len(tensor) and bool((tensor == tensor[0]).all()):
            reasons.append(f"{name}: the features of all images are the same")
        widths.add(tensor.shape[1:])
    if not reasons and len(widths) > 1:
        reasons.append(f"{', '.join(names)}: different numbers of features")
    return reasons
