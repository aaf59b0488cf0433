# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's W4A4: signed 4-bit weights and tokens with one scale per row, ConvRot.

Tensors: ``weight`` int8 (N, K / 2), two's complement nibbles from -7 to 7, the even column in the
low nibble; ``weight_scale`` float32 (N,). The input is always rotated, and each token gets the
scale ``amax / 7``.
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
from dtq.engines.convrot import from_regular, rotated_block, to_regular
from dtq.engines.target import Loss, StoredLayer
from dtq.errors import CheckpointError
from dtq.formats.packing import pack_bits, unpack_bits
from dtq.plan.layers import LayerSpec

COLUMNS = 64
"""K must be a multiple of this for the engine's kernels."""


def encode(layer: StoredLayer) -> tuple[Tensors, Options]:
    """Tensors and marker of a layer in ``int4-narrow-row``."""
    block = layer.spec.hadamard_block_size
    values = to_regular(unpack_bits(layer.tensors["weight"], 4).to(torch.int8) - 8, block)
    tensors = {
        "weight": pack_bits(values & 15, 4),
        "weight_scale": layer.tensors["weight_scale"].reshape(-1),
    }
    options = {"convrot_groupsize": block, "quant_group_size": COLUMNS, "linear_dtype": "int4"}
    return tensors, options


def decode(tensors: Tensors, options: Options, where: str) -> Decoded:
    """Inverse of :func:`encode`.

    Raises:
        CheckpointError: a shape, a dtype or a value is not that of the format.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"]
    rows, columns = matrix(weight, torch.int8, where, per_byte=2)
    if scale.dtype != torch.float32 or scale.numel() != rows:
        raise CheckpointError(f"{where}.weight_scale: got {described(scale)} for {rows} rows")
    if options.get("linear_dtype", "int4") != "int4":
        raise CheckpointError(f"{where}: linear_dtype {options['linear_dtype']!r}; dtq reads int4")
    values = (unpack_bits(weight, 4) ^ 8).to(torch.int8) - 8  # two's complement
    if bool((values == -8).any()):
        raise CheckpointError(f"{where}.weight: holds -8, which has no negative in 4 bits")
    block = rotated_block(options, columns, where, always=True)
    stored = {
        "weight": pack_bits(from_regular(values, block) + 8, 4),
        "weight_scale": scale.reshape(-1, 1),
    }
    return (rows, columns), stored, block


def shape_reason(spec: LayerSpec, shape: tuple[int, int]) -> str | None:
    """Why a layer of this shape and rotation cannot be stored; None if it can."""
    if spec.hadamard_block_size == 1 or not spec.pre_quant:
        return "its input is not rotated"
    if shape[1] % COLUMNS:
        return f"its width {shape[1]} is no multiple of {COLUMNS}"
    return None


W4A4 = ComfyFormat(
    "convrot_w4a4",
    "int4-narrow-row",
    "int4-row",
    encode,
    decode,
    shape_reason=shape_reason,
)

TARGET = comfy_target(
    "comfy-w4a4",
    "4-bit weights and tokens (convrot_w4a4): ComfyUI, comfy-kitchen, SGLang",
    (W4A4, INT8),
    recipe="convrot-w4a4",
    transforms=("convrot",),
    loss=Loss(
        "groups and zero points of weights and tokens, smoothing, low-rank branch, step policy",
        "w4a4",
        3.08,
        80.98,
    ),
)
