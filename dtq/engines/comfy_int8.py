# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's int8: one scale per output channel, int8 tokens, optionally the rotation of ConvRot.

Tensors: ``weight`` int8 (N, K), ``weight_scale`` float32 (N, 1). With ``convrot`` the weight is
that for an input rotated by regular Hadamard matrices (:func:`dtq.linalg.hadamard.regular_signs`)
over blocks of ``convrot_groupsize`` channels, a power of 4. Each token gets the scale ``amax /
127``. Read by ComfyUI, comfy-kitchen, stable-diffusion.cpp and SGLang.
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
from dtq.engines.convrot import from_regular, rotated_block, to_regular
from dtq.engines.target import Loss, StoredLayer
from dtq.errors import CheckpointError


def encode(layer: StoredLayer) -> tuple[Tensors, Options]:
    """Tensors and marker of a layer in ``int8-row``."""
    weight, transform = layer.tensors["weight"], layer.transform()
    options: Options = {}
    if transform is not None:
        weight = to_regular(weight, transform.block)
        options = {"convrot": True, "convrot_groupsize": transform.block}
    return {"weight": weight, "weight_scale": layer.tensors["weight_scale"]}, options


def decode(tensors: Tensors, options: Options, where: str) -> Decoded:
    """Inverse of :func:`encode`; a scale per tensor becomes one per channel.

    Raises:
        CheckpointError: shapes, dtypes or values are not those of the format.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"]
    rows, columns = matrix(weight, torch.int8, where)
    if not scale.is_floating_point() or scale.numel() not in (1, rows):
        raise CheckpointError(f"{where}.weight_scale: got {described(scale)} for {rows} rows")
    if bool((weight == -128).any()):
        raise CheckpointError(
            f"{where}.weight: holds -128, which has no negative in int8; quantize it again"
        )
    block = rotated_block(options, columns, where)
    stored = {
        "weight": from_regular(weight, block) if block > 1 else weight,
        "weight_scale": scale.float().reshape(-1, 1).expand(rows, 1).contiguous(),
    }
    return (rows, columns), stored, block


INT8 = ComfyFormat("int8_tensorwise", "int8-row", "int8-row", encode, decode, weight_only=True)

TARGET = comfy_target(
    "comfy-int8",
    "int8 weights and tokens (int8_tensorwise, ConvRot): ComfyUI, comfy-kitchen, "
    "stable-diffusion.cpp",
    (INT8,),
    recipe="convrot-w8a8",
    transforms=("none", "convrot"),
    loss=Loss(
        "smoothing, random signs of the rotation, low-rank branch, step policy, static scales",
        "w8a8",
        1.18,
        16.6,
    ),
)
