# SPDX-License-Identifier: Apache-2.0
"""A diffusers folder whose linears are quantized by another library: a config and one tensor file.

The metadata of the file has under ``dtq``, as JSON, what the library has no place for: the recipe,
the dtype of the products, and what a target adds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dtq.engines.target import OF_THE_CHECKPOINT, Contents, StoredLayer
from dtq.errors import CheckpointError, InputError
from dtq.io.atomic import atomic_save_tensors, atomic_write
from dtq.io.safe_parse import parse_json, read_json
from dtq.pipelines.weight_files import open_header

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
METADATA, QUANTIZATION = "dtq", "quantization_config"


@dataclass(frozen=True)
class ModelFolder:
    """What is in a folder, before a target makes layers of the tensors.

    Attributes:
        file: of the tensors.
        tensors: all of them.
        metadata: of the file.
        own: what dtq wrote into the metadata; empty if it did not write the file.
        config: all of ``config.json``.
    """

    file: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    own: dict[str, Any]
    config: dict[str, Any]

    def contents(self, layers: dict[str, StoredLayer]) -> Contents:
        """The layers, the tensors that are left, and what the model is."""
        plain = {key: value for key, value in self.config.items() if key not in OF_THE_CHECKPOINT}
        recipe, dtype = (str(self.own.get(key, "")) for key in ("recipe", "compute_dtype"))
        return Contents(layers, self.tensors, plain, recipe, dtype)


def save(
    folder: Path,
    contents: Contents,
    tensors: Mapping[str, Tensor],
    *,
    quantization: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the config and the tensors; equal contents give equal bytes.

    Args:
        folder: that exists.
        contents: config, recipe and compute dtype are taken from it.
        tensors: of the file, by name.
        quantization: value of ``QUANTIZATION`` in the config; None: the config does not have it.
        own: more for dtq to read back.
        metadata: more of the file, for the library.
    """
    about = {"recipe": contents.recipe, "compute_dtype": contents.compute_dtype, **(own or {})}
    text = {**(metadata or {}), "format": "pt", METADATA: json.dumps(about, sort_keys=True)}
    atomic_save_tensors(folder / WEIGHTS, tensors, text)
    config = (
        contents.config if quantization is None else {**contents.config, QUANTIZATION: quantization}
    )
    atomic_write(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def read(path: Path) -> ModelFolder:
    """Read a folder.

    Raises:
        CheckpointError: there is no such file of tensors, or it is damaged.
        InputError: the config is missing or damaged.
    """
    file = path / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{path}: has no {WEIGHTS}; dtq reads folders with one file")
    with open_header(file) as opened:
        metadata = opened.metadata() or {}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    own = parse_json(metadata.get(METADATA, "{}"), f"{file}: {METADATA}")
    if not isinstance(own, dict):
        raise CheckpointError(f"{file}: the metadata {METADATA!r} is damaged")
    return ModelFolder(file, tensors, metadata, own, read_json(path / CONFIG))


def is_quantized_by(path: Path, method: str) -> bool:
    """Whether a folder has a config that names a quantization method of diffusers.

    Args:
        path: the folder.
        method: value of ``quant_method``.
    """
    if not (path / CONFIG).is_file():
        return False
    try:
        quantization = read_json(path / CONFIG).get(QUANTIZATION)
    except InputError:
        return False  # another reader says what is wrong with it
    return isinstance(quantization, dict) and quantization.get("quant_method") == method
