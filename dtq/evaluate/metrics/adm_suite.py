# SPDX-License-Identifier: Apache-2.0
"""Files of the ADM evaluation suite (openai/guided-diffusion, evaluations/): npz in and out."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtq.errors import InputError
from dtq.evaluate.metrics.fid import FeatureMoments
from dtq.evaluate.metrics.images import as_bytes


@dataclass(frozen=True)
class AdmReference:
    """What generated pictures are compared with.

    Attributes:
        name: of the file.
        pictures: uint8 (N, H, W, 3), or None for a file of moments alone.
        pool: moments of the pooled features, when the file has them.
        spatial: moments of the spatial features, when the file has them.
    """

    name: str
    images: Tensor | None = None
    pool: FeatureMoments | None = None
    spatial: FeatureMoments | None = None


def write(pictures: Tensor, path: Path) -> None:
    """Samples for the suite: ``arr_0``, uint8 (N, H, W, 3).

    Args:
        pictures: float (N, 3, H, W) in [0, 1].
        path: ends in ``.npz``.
    """
    np.savez(path, arr_0=as_bytes(pictures).permute(0, 2, 3, 1).contiguous().numpy())


def write_moments(path: Path, pool: FeatureMoments, spatial: FeatureMoments) -> None:
    """A reference of moments alone: ``mu, sigma, mu_s, sigma_s`` in float64."""
    np.savez(
        path,
        mu=pool.mean.numpy(),
        sigma=pool.cov.numpy(),
        mu_s=spatial.mean.numpy(),
        sigma_s=spatial.cov.numpy(),
    )


def read(path: Path) -> AdmReference:
    """A sample or reference file of the suite; pickled arrays are refused.

    Raises:
        InputError: no such file, or it holds neither pictures nor moments.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as held:
            data = {name: held[name] for name in held.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an npz of plain arrays ({error})") from error
    shown = data.get("arr_0")
    if shown is not None and (shown.ndim != 4 or shown.shape[-1] != 3 or shown.dtype != np.uint8):
        raise InputError(
            f"{path}: arr_0 is {shown.dtype} {list(shown.shape)}, expected uint8 (N, H, W, 3)"
        )
    pool, spatial = _moments(data, "mu", "sigma", path), _moments(data, "mu_s", "sigma_s", path)
    if shown is None and pool is None:
        raise InputError(f"{path}: has {sorted(data)}; expected arr_0, or mu and sigma")
    pictures = None if shown is None else torch.from_numpy(shown)
    return AdmReference(path.name, pictures, pool, spatial)


def _moments(data: dict[str, np.ndarray], mean: str, cov: str, path: Path) -> FeatureMoments | None:
    if mean not in data or cov not in data:
        return None
    size = data[mean].shape[0] if data[mean].ndim == 1 else -1
    if data[cov].shape != (size, size):
        raise InputError(
            f"{path}: {mean} is {data[mean].shape}, {cov} {data[cov].shape}; "
            f"expected (D,) and (D, D)"
        )
    return FeatureMoments(
        torch.from_numpy(data[mean].astype(np.float64)),
        torch.from_numpy(data[cov].astype(np.float64)),
    )
