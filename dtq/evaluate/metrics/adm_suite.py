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
    """The reference that generated images are compared with.

    Attributes:
        name: of the file.
        images: uint8 (N, H, W, 3), or None if the file has moments only.
        pool: moments of the pooled features, if the file has them.
        spatial: moments of the spatial features, if the file has them.
    """

    name: str
    images: Tensor | None = None
    pool: FeatureMoments | None = None
    spatial: FeatureMoments | None = None


def write(images: Tensor, path: Path) -> None:
    """Write samples for the suite: ``arr_0``, uint8 (N, H, W, 3).

    Args:
        images: float (N, 3, H, W) in [0, 1].
        path: ends in ``.npz``.
    """
    np.savez(path, arr_0=as_bytes(images).permute(0, 2, 3, 1).contiguous().numpy())


def read(path: Path) -> AdmReference:
    """Read a sample or reference file of the suite; pickled arrays are refused.

    Raises:
        InputError: no such file, or it has neither images nor moments.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an npz of plain arrays ({error})") from error
    arr = data.get("arr_0")
    if arr is not None and (arr.ndim != 4 or arr.shape[-1] != 3 or arr.dtype != np.uint8):
        found = f"{arr.dtype} {list(arr.shape)}"
        raise InputError(f"{path}: arr_0 is {found}, expected uint8 (N, H, W, 3)")
    pool, spatial = _moments(data, "mu", "sigma", path), _moments(data, "mu_s", "sigma_s", path)
    if arr is None and pool is None:
        raise InputError(f"{path}: has {sorted(data)}; expected arr_0, or mu and sigma")
    images = None if arr is None else torch.from_numpy(arr)
    return AdmReference(path.name, images, pool, spatial)


def _moments(data: dict[str, np.ndarray], mean: str, cov: str, path: Path) -> FeatureMoments | None:
    if mean not in data or cov not in data:
        return None
    mu, sigma = data[mean].shape, data[cov].shape
    if len(mu) != 1 or sigma != 2 * mu:
        raise InputError(f"{path}: {mean} is {mu}, {cov} {sigma}; expected (D,) and (D, D)")
    return FeatureMoments(*(torch.from_numpy(data[n].astype(np.float64)) for n in (mean, cov)))
