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
    Options,
    Tensors,
    comfy_target,
    convrot_reason,
    decoded_layer,
    described,
    from_regular,
    rotated_block,
    to_regular,
)
from dtq.engines.target import Limits, StoredLayer, common_reason
from dtq.errors import CheckpointError

LIMITS = Limits(
    formats={"int8-row": ("int8-row", "none")},
    recipe="convrot-w8a8",
    transforms=("none", "convrot"),
    fallbacks=("int8-row",),
)


def encode(layer: StoredLayer) -> tuple[Tensors, Options]:
    """Tensors and marker of a layer in ``int8-row``."""
    weight, transform = layer.tensors["weight"], layer.transform()
    options: Options = {}
    if transform is not None:
        weight = to_regular(weight, transform.block)
        options = {"convrot": True, "convrot_groupsize": transform.block}
    return {"weight": weight, "weight_scale": layer.tensors["weight_scale"]}, options


def decode(tensors: Tensors, options: Options, where: str) -> StoredLayer:
    """Inverse of :func:`encode`; a scale per tensor becomes one per channel.

    Raises:
        CheckpointError: shapes, dtypes or values are not those of the format.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if weight.dtype != torch.int8 or weight.ndim != 2:
        raise CheckpointError(f"{where}.weight: expected int8 (N, K), got {described(weight)}")
    rows, columns = weight.shape
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
    return decoded_layer("int8-row", (rows, columns), stored, options, block, "int8-row")


def unsupported_reason(layer: StoredLayer) -> str | None:
    """Why a layer cannot be stored; None if it can."""
    return common_reason(layer, LIMITS) or convrot_reason(layer)


INT8 = ComfyFormat(
    "int8_tensorwise", "int8-row", encode, decode, ("weight", "weight_scale"), required=2
)

TARGET = comfy_target(
    "comfy-int8",
    "int8 weights and tokens (int8_tensorwise, ConvRot): ComfyUI, comfy-kitchen, "
    "stable-diffusion.cpp",
    (INT8,),
    LIMITS,
    unsupported_reason,
)
