# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's W4A8: 4-bit codes into a table that expands to int8, int8 tokens, ConvRot.

Tensors: ``weight`` int8 (N, K / 2), the even column in the low nibble; ``weight_s_rel`` e4m3
(N, K / 16); ``weight_s_channel`` float32 (N,); ``weight_codebook`` float32 (16,). The int8 weight
is ``round(codebook[q] * s_rel)``. The input is always rotated. A regular rotation permutes whole
groups of 16 columns, and columns inside them, so scales move with their groups; a column that
changes its sign gets the mirrored codes, because dtq's tables are symmetric.
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
    rotated_block,
)
from dtq.engines.comfy_int8 import INT8
from dtq.engines.target import Limits, StoredLayer, common_reason
from dtq.errors import CheckpointError
from dtq.formats.packing import pack_bits, unpack_bits
from dtq.linalg.hadamard import regular_columns, regular_signs

GROUP = 16
LIMITS = Limits(
    formats={"lut4-2l-g16": ("int8-row",), "int8-row": ("int8-row", "none")},
    recipe="convrot-w4a8",
    transforms=("convrot",),
    fallbacks=("int8-row",),
)


def encode(layer: StoredLayer) -> tuple[Tensors, Options]:
    """Tensors and marker of a layer in ``lut4-2l-g16``."""
    block = layer.spec.hadamard_block_size
    weight = _regular(layer.tensors["weight"], block)
    scale = _regular_groups(layer.tensors["weight_scale_2"], block)
    tensors = {
        "weight": weight,
        "weight_s_rel": scale,
        "weight_s_channel": layer.tensors["weight_scale"].reshape(-1),
        "weight_codebook": layer.tensors["weight_lut"].reshape(-1),
    }
    return tensors, {"group_size": GROUP, "convrot_groupsize": block}


def decode(tensors: Tensors, options: Options, where: str) -> StoredLayer:
    """Inverse of :func:`encode`.

    Raises:
        CheckpointError: a shape or dtype is not that of the format, or the file uses a part of it
            that dtq does not read.
    """
    if "weight_correction" in tensors:
        raise CheckpointError(f"{where}.weight_correction: dtq reads symmetric groups only")
    weight, scale = tensors["weight"], tensors["weight_s_rel"]
    if weight.dtype != torch.int8 or weight.ndim != 2:
        raise CheckpointError(f"{where}.weight: expected int8 (N, K / 2), got {described(weight)}")
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    channel, table = tensors["weight_s_channel"], tensors["weight_codebook"]
    expected = {
        "weight_s_rel": (scale, torch.float8_e4m3fn, (rows, columns // GROUP)),
        "weight_s_channel": (channel, torch.float32, (rows,)),
        "weight_codebook": (table, torch.float32, (16,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or options["group_size"] != GROUP:
            raise CheckpointError(
                f"{where}.{name}: got {described(tensor)} in groups of {options['group_size']!r}; "
                f"dtq reads {str(dtype).removeprefix('torch.')} {list(shape)} in groups of {GROUP}"
            )
    if columns % GROUP or not torch.equal(table, -table.flip(0)):
        raise CheckpointError(
            f"{where}.weight_codebook: is not symmetric, which dtq needs to move signs of columns"
        )
    block = rotated_block({"convrot": True, **options}, columns, where)
    if block < GROUP:
        raise CheckpointError(f"{where}: convrot_groupsize {block} is narrower than a group")
    stored = {
        "weight": _from_regular(weight, block),
        "weight_scale": channel.reshape(-1, 1),
        "weight_scale_2": _regular_groups(scale, block),  # its own inverse
        "weight_lut": table.reshape(1, -1),
    }
    return decoded_layer("lut4-2l-g16", (rows, columns), stored, options, block, "int8-row")


def unsupported_reason(layer: StoredLayer) -> str | None:
    """Why a layer cannot be stored; None if it can."""
    reason = common_reason(layer, LIMITS) or convrot_reason(layer)
    if reason or layer.spec.weight_format != "lut4-2l-g16":
        return reason
    if layer.spec.hadamard_block_size < GROUP:
        return f"its input is not rotated in blocks of {GROUP} or more"
    return None


def _regular(weight: torch.Tensor, block: int) -> torch.Tensor:
    """Packed codes under dtq's rotation as those under the regular one."""
    grouped = unpack_bits(weight, 4).unflatten(1, (-1, block))[..., regular_columns(block)]
    return pack_bits(torch.where(regular_signs(block) < 0, 15 - grouped, grouped).flatten(1), 4)


def _from_regular(weight: torch.Tensor, block: int) -> torch.Tensor:
    grouped = unpack_bits(weight, 4).unflatten(1, (-1, block))
    codes = torch.where(regular_signs(block) < 0, 15 - grouped, grouped)
    return pack_bits(codes[..., regular_columns(block)].flatten(1), 4)


def _regular_groups(scale: torch.Tensor, block: int) -> torch.Tensor:
    """Scales of groups (N, K / 16) in the order of their columns under the regular rotation."""
    bits = scale.view(torch.uint8).unflatten(1, (-1, block // GROUP))
    return bits[..., regular_columns(block // GROUP)].flatten(1).view(torch.float8_e4m3fn)


W4A8 = ComfyFormat(
    "asym_w4a8_int8",
    "lut4-2l-g16",
    encode,
    decode,
    ("weight", "weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction"),
    required=4,
)

TARGET = comfy_target(
    "comfy-w4a8",
    "4-bit weights that expand to int8, int8 tokens (asym_w4a8_int8, ConvRot): ComfyUI, "
    "comfy-kitchen, SGLang",
    (W4A8, INT8),
    LIMITS,
    unsupported_reason,
)
