# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's scaled FP8: e4m3 weights with one scale per matrix.

Tensors: ``weight`` e4m3 (N, K), ``weight_scale`` float32 (). On GPUs with FP8 products the engine
rounds all tokens of a call with one scale; elsewhere it decodes the weight.
"""

from __future__ import annotations

import torch

from dtq.engines.comfy_file import (
    ComfyFormat,
    Decoded,
    Options,
    Tensors,
    comfy_target,
    described,
    matrix,
)
from dtq.engines.comfy_int8 import INT8
from dtq.engines.target import Loss, StoredLayer
from dtq.errors import CheckpointError


def encode(layer: StoredLayer) -> tuple[Tensors, Options]:
    """Tensors and marker of a layer in ``fp8-matrix``."""
    scale = layer.tensors["weight_scale"]
    return {"weight": layer.tensors["weight"], "weight_scale": scale[0, 0].clone()}, {}


def decode(tensors: Tensors, options: Options, where: str) -> Decoded:
    """Inverse of :func:`encode`.

    Raises:
        CheckpointError: a shape or dtype is not that of the format.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"]
    rows, columns = matrix(weight, torch.float8_e4m3fn, where)
    if not scale.is_floating_point() or scale.numel() != 1:
        raise CheckpointError(f"{where}.weight_scale: got {described(scale)}; dtq reads one scale")
    one = scale.float().reshape(1, 1)
    return (rows, columns), {"weight": weight, "weight_scale": one.repeat(rows, 1)}, 1


FP8 = ComfyFormat("float8_e4m3fn", "fp8-matrix", "fp8-row", encode, decode, weight_only=True)

TARGET = comfy_target(
    "comfy-fp8",
    "FP8 weights with one scale each, and tokens (float8_e4m3fn): ComfyUI, comfy-kitchen",
    (FP8, INT8),
    recipe="comfy-fp8",
    transforms=("none",),
    loss=Loss(
        "a scale per output channel, rotation, smoothing, low-rank branch, step policy",
        "w8a8",
        18.03,
        19.51,
    ),
)
