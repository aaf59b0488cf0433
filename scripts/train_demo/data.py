# SPDX-License-Identifier: Apache-2.0
"""The images that the bundled models were trained on: Noto Emoji, 64x64, 99 subcategories.

The artwork comes in the npm package ``emoji-datasource-google`` (``npm pack
emoji-datasource-google@16.0.0``). It is only needed to train the bundled models.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dtq.errors import InputError

_IMAGES = "package/img/google/64/"


def load_emoji(package: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Read every image of the package, on a white background.

    Args:
        package: the ``.tgz`` that ``npm pack`` writes, or the folder it unpacks to.

    Returns:
        Images, uint8 (N, 3, 64, 64); labels, int64 (N,), indices into the names; names of the
        subcategories in alphabetical order.

    Raises:
        InputError: the file is not that package.
    """
    read = _reader(package)
    entries = []
    for emoji in json.loads(read("package/emoji.json")):
        variants = [emoji, *emoji.get("skin_variations", {}).values()]
        entries += [(v["image"], emoji["subcategory"]) for v in variants if v["has_img_google"]]
    entries.sort()
    names = sorted({subcategory for _, subcategory in entries})
    images = torch.stack([_on_white(read(_IMAGES + file)) for file, _ in entries])
    labels = torch.tensor([names.index(subcategory) for _, subcategory in entries])
    return images, labels, names


def load_cutouts(package: Path, names: Sequence[str]) -> dict[str, Image.Image]:
    """Images of the package with transparency, by their short names in ``emoji.json``.

    Raises:
        InputError: the file is not that package, or has no such image.
    """
    read = _reader(package)
    files = {
        entry["short_name"]: entry["image"] for entry in json.loads(read("package/emoji.json"))
    }
    if missing := sorted(set(names) - set(files)):
        raise InputError(f"{package}: no emoji named {', '.join(missing)}")
    return {name: _rgba(read(_IMAGES + files[name])) for name in names}


def _reader(package: Path) -> Callable[[str], bytes]:
    if package.is_dir():
        return lambda name: (package.parent / name).read_bytes()
    if not package.is_file():
        raise InputError(
            f"{package}: no such file. Get it: npm pack emoji-datasource-google@16.0.0"
        )
    files: dict[str, bytes] = {}
    with tarfile.open(package) as tar:
        for member in tar:
            if member.name == "package/emoji.json" or member.name.startswith(_IMAGES):
                stream = tar.extractfile(member)
                if stream is not None:
                    files[member.name] = stream.read()
    if "package/emoji.json" not in files:
        raise InputError(f"{package}: not the npm package emoji-datasource-google")
    return files.__getitem__


def _rgba(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _on_white(png: bytes) -> Tensor:
    image = _rgba(png)
    white = Image.new("RGBA", image.size, "white")
    rgb = Image.alpha_composite(white, image).convert("RGB")
    if rgb.size != (64, 64):
        rgb = rgb.resize((64, 64), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
