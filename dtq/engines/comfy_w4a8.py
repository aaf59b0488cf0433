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
from dtq.linalg.hadamard import regular_columns
from dtq.plan.layers import LayerSpec

GROUP = 16


def encode(layer: StoredLayer) -> tuple[Tensors, Options]:
    """Tensors and marker of a layer in ``lut4-2l-g16``."""
    block = layer.spec.hadamard_block_size
    weight = _packed(to_regular(_levels(layer.tensors["weight"]), block))
    scale = _regular_groups(layer.tensors["weight_scale_2"], block)
    tensors = {
        "weight": weight,
        "weight_s_rel": scale,
        "weight_s_channel": layer.tensors["weight_scale"].reshape(-1),
        "weight_codebook": layer.tensors["weight_lut"].reshape(-1),
    }
    return tensors, {"group_size": GROUP, "convrot_groupsize": block}


def decode(tensors: Tensors, options: Options, where: str) -> Decoded:
    """Inverse of :func:`encode`.

    Raises:
        CheckpointError: a shape or dtype is not that of the format, or the file uses a part of it
            that dtq does not read.
    """
    if "weight_correction" in tensors:
        raise CheckpointError(f"{where}.weight_correction: dtq reads symmetric groups only")
    weight, scale = tensors["weight"], tensors["weight_s_rel"]
    rows, columns = matrix(weight, torch.int8, where, per_byte=2)
    group = options.get("group_size")
    channel, table = tensors["weight_s_channel"], tensors["weight_codebook"]
    expected = {
        "weight_s_rel": (scale, torch.float8_e4m3fn, (rows, columns // GROUP)),
        "weight_s_channel": (channel, torch.float32, (rows,)),
        "weight_codebook": (table, torch.float32, (16,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or group != GROUP:
            raise CheckpointError(
                f"{where}.{name}: got {described(tensor)} in groups of {group!r}; "
                f"dtq reads {str(dtype).removeprefix('torch.')} {list(shape)} in groups of {GROUP}"
            )
    if columns % GROUP or not torch.equal(table, -table.flip(0)):
        raise CheckpointError(
            f"{where}.weight_codebook: is not symmetric, which dtq needs to move signs of columns"
        )
    block = rotated_block(options, columns, where, always=True)
    if block < GROUP:
        raise CheckpointError(f"{where}: convrot_groupsize {block} is narrower than a group")
    stored = {
        "weight": _packed(from_regular(_levels(weight), block)),
        "weight_scale": channel.reshape(-1, 1),
        "weight_scale_2": _regular_groups(scale, block),  # its own inverse
        "weight_lut": table.reshape(1, -1),
    }
    return (rows, columns), stored, block


def shape_reason(spec: LayerSpec, shape: tuple[int, int]) -> str | None:
    """Why a layer of this shape and rotation cannot be stored; None if it can."""
    if spec.hadamard_block_size < GROUP or not spec.pre_quant:
        return f"its input is not rotated in blocks of {GROUP} or more"
    return None


def _levels(weight: torch.Tensor) -> torch.Tensor:
    """Packed codes as odd numbers from -15 to 15, whose signs are those of the table."""
    return 2 * unpack_bits(weight, 4).to(torch.int8) - 15


def _packed(levels: torch.Tensor) -> torch.Tensor:
    return pack_bits((levels + 15) // 2, 4)


def _regular_groups(scale: torch.Tensor, block: int) -> torch.Tensor:
    """Scales of groups (N, K / 16) in the order of their columns under the regular rotation."""
    bits = scale.view(torch.uint8).unflatten(1, (-1, block // GROUP))
    return bits[..., regular_columns(block // GROUP)].flatten(1).view(torch.float8_e4m3fn)


W4A8 = ComfyFormat(
    "asym_w4a8_int8",
    "lut4-2l-g16",
    "int8-row",
    encode,
    decode,
    ("weight", "weight_s_rel", "weight_s_channel", "weight_codebook"),
    optional=("weight_correction",),
    shape_reason=shape_reason,
)

TARGET = comfy_target(
    "comfy-w4a8",
    "4-bit weights that expand to int8, int8 tokens (asym_w4a8_int8, ConvRot): ComfyUI, "
    "comfy-kitchen, SGLang",
    (W4A8, INT8),
    recipe="convrot-w4a8",
    transforms=("convrot",),
    loss=Loss(
        "smoothing, low-rank branch, step policy, static scales",
        "w4a8",
        0.66,
        2.82,
    ),
)
