# SPDX-License-Identifier: Apache-2.0
"""GGUF: the block formats of ggml, weight-only, for diffusers, stable-diffusion.cpp and others.

A quantized linear is one tensor ``NAME.weight`` in the blocks of its type. Every other tensor is
float32, or float16 where the model has float16: readers decode bfloat16 in linear layers alone, and
``dtq.dtype.NAME`` is the dtype that dtq restores. The metadata has the diffusers config of the
model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtq.engines.gguf_blocks import BLOCK_TYPES, from_blocks, to_blocks
from dtq.engines.gguf_file import INTEGERS, GgufTensor, is_gguf, read_gguf, write_gguf
from dtq.engines.target import Contents, Limits, Loss, StoredLayer, Target, common_reason
from dtq.errors import CheckpointError
from dtq.io.safe_parse import parse_json
from dtq.plan.layers import LayerSpec

LIMITS = Limits(
    formats=dict.fromkeys(BLOCK_TYPES, ("none",)),
    recipe="gguf-q4",
    fallbacks=("q8_0",),
)
DTYPE = "dtq.dtype."
NARROWED = {"bfloat16": torch.bfloat16, "bool": torch.bool, "uint8": torch.uint8}
"""Dtypes that are stored as float32, and restored."""
ARCHITECTURE = "diffusers"
"""Value of ``general.architecture`` where the names of the tensors are those of diffusers."""


def write(contents: Contents, path: Path) -> None:
    """Write a file; equal contents give equal bytes."""
    tensors, restored = {}, dict[str, str]()
    for name, tensor in sorted(contents.others.items()):
        data = tensor
        if tensor.dtype != torch.float16 and tensor.dtype not in INTEGERS:
            data = tensor.float()
        if data.dtype != tensor.dtype:
            restored[DTYPE + name] = str(tensor.dtype).removeprefix("torch.")
        tensors[name] = GgufTensor("", tuple(data.shape), data)
    for name, layer in contents.layers.items():
        kind = layer.spec.weight_format
        blocks = to_blocks(kind, layer.weights())
        tensors[f"{name}.weight"] = GgufTensor(kind, layer.shape, blocks)
    entries: dict[str, str | int] = {
        "general.architecture": contents.architecture or ARCHITECTURE,
        "general.quantization_version": 2,
        "dtq.config": json.dumps(contents.config, sort_keys=True),
        "dtq.recipe": contents.recipe,
        "dtq.compute_dtype": contents.compute_dtype,
        **restored,
    }
    write_gguf(path, entries, dict(sorted(tensors.items())))


def read(path: Path) -> Contents:
    """Read a file.

    Raises:
        CheckpointError: the file is damaged, or has quantized tensors that are no weights.
    """
    entries, tensors = read_gguf(path)
    layers, others = {}, {}
    for name, tensor in tensors.items():
        if not tensor.kind:
            others[name] = _restored(path, name, tensor.data, entries)
            continue
        if not name.endswith(".weight"):
            raise CheckpointError(
                f"{path}: {name} is in {tensor.kind}, and is not the weight of a layer"
            )
        rows, columns = tensor.shape
        spec = LayerSpec(tensor.kind, "none")
        weight = from_blocks(tensor.kind, tensor.data)
        layers[name.removesuffix(".weight")] = StoredLayer(spec, (rows, columns), weight)
    config = parse_json(str(entries.get("dtq.config", "{}")), f"{path}: dtq.config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: dtq.config is damaged")
    recipe, dtype = (str(entries.get(f"dtq.{key}", "")) for key in ("recipe", "compute_dtype"))
    return Contents(layers, others, config, recipe, dtype)


def _restored(path: Path, name: str, data: Tensor, entries: Mapping[str, Any]) -> Tensor:
    """A tensor in the dtype that it had in the model."""
    dtype = entries.get(DTYPE + name)
    if dtype is not None:
        if dtype not in NARROWED:
            raise CheckpointError(f"{path}: {DTYPE}{name} is {dtype!r}")
        data = data.to(NARROWED[dtype])
    return data


TARGET = Target(
    "gguf",
    "GGUF, weight-only (Q8_0, K-quants, IQ4_NL): diffusers, ComfyUI-GGUF, stable-diffusion.cpp",
    ".gguf",
    LIMITS,
    partial(common_reason, limits=LIMITS),
    write,
    read,
    is_gguf,
    loss=Loss(
        "rotation, smoothing, low-rank branch, int8 tokens, step policy",
        "w4a16",
        0.63,
        0.31,
    ),
)
