# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's NVFP4: E2M1 codes, e4m3 scales per 16 columns in the order of the tensor cores.

Tensors: ``weight`` uint8 (N, K / 2), the even column in the high nibble; ``weight_scale`` e4m3, (N,
K / 16) padded to multiples of 128 and 4 and tiled; ``weight_scale_2`` float32 (). In a tile of 128
rows and 4 groups, row ``32 a + b`` and group ``g`` lie at ``16 b + 4 a + g`` (cuBLAS, block scaling
factors layout).
"""

from __future__ import annotations

import torch
from torch import Tensor

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
from dtq.plan.layers import LayerSpec

GROUP, ROWS, GROUPS = 16, 128, 4


def encode(layer: StoredLayer) -> tuple[Tensors, Options]:
    """Tensors and marker of a layer in ``nvfp4`` or ``nvfp4-46``."""
    tensors = {
        "weight": _swapped(layer.tensors["weight"].view(torch.uint8)),
        "weight_scale": tiled(layer.tensors["weight_scale"]),
        "weight_scale_2": layer.tensors["weight_scale_2"].reshape(()),
    }
    return tensors, {}


def decode(tensors: Tensors, options: Options, where: str) -> Decoded:
    """Inverse of :func:`encode`.

    Raises:
        CheckpointError: a shape or dtype is not that of the format.
    """
    weight, scale, scale_2 = (tensors[k] for k in ("weight", "weight_scale", "weight_scale_2"))
    rows, columns = matrix(weight, torch.uint8, where, per_byte=2)
    padded = -(-rows // ROWS) * ROWS, -(-(columns // GROUP) // GROUPS) * GROUPS
    if scale.dtype != torch.float8_e4m3fn or tuple(scale.shape) != padded or columns % GROUP:
        raise CheckpointError(f"{where}.weight_scale: got {described(scale)}, expected {padded}")
    if scale_2.dtype != torch.float32 or scale_2.numel() != 1:
        raise CheckpointError(f"{where}.weight_scale_2: got {described(scale_2)}")
    stored = {
        "weight": _swapped(weight).view(torch.int8),
        "weight_scale": untiled(scale, rows, columns // GROUP),
        "weight_scale_2": scale_2.reshape(1, 1),
    }
    return (rows, columns), stored, 1


def tiled(scale: Tensor) -> Tensor:
    """Scales (N, groups) padded and in the order of the tensor cores."""
    rows, groups = scale.shape
    high, wide = -(-rows // ROWS), -(-groups // GROUPS)
    padded = torch.zeros(high * ROWS, wide * GROUPS, dtype=torch.uint8)
    padded[:rows, :groups] = scale.view(torch.uint8)
    tiles = padded.reshape(high, 4, 32, wide, GROUPS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * ROWS, wide * GROUPS).view(torch.float8_e4m3fn)


def untiled(scale: Tensor, rows: int, groups: int) -> Tensor:
    """Inverse of :func:`tiled`."""
    high, wide = scale.shape[0] // ROWS, scale.shape[1] // GROUPS
    tiles = scale.view(torch.uint8).reshape(high, wide, 32, 4, GROUPS).permute(0, 3, 2, 1, 4)
    plain = tiles.reshape(high * ROWS, wide * GROUPS)[:rows, :groups]
    return plain.contiguous().view(torch.float8_e4m3fn)


def shape_reason(spec: LayerSpec, shape: tuple[int, int]) -> str | None:
    """Why a layer of this shape cannot be stored; None if it can.

    Every linear is checked by itself, also where original files join the rows of several: their
    sum is then a multiple of 16, whatever names the file gets.
    """
    return f"its {shape[0]} rows are no multiple of 16" if shape[0] % 16 else None


def _swapped(weight: Tensor) -> Tensor:
    return (weight >> 4) | (weight << 4)


NVFP4 = ComfyFormat(
    "nvfp4",
    "nvfp4",
    "nvfp4",
    encode,
    decode,
    ("weight", "weight_scale", "weight_scale_2"),
    weight_only=True,
    also=("nvfp4-46",),
    shape_reason=shape_reason,
)

TARGET = comfy_target(
    "comfy-nvfp4",
    "NVFP4 weights and tokens: ComfyUI, comfy-kitchen",
    (NVFP4, INT8),
    recipe="comfy-nvfp4",
    transforms=("none",),
    loss=Loss(
        "rotation, smoothing, low-rank branch, step policy",
        "nvfp4",
        1.3,
        34.01,
    ),
)
