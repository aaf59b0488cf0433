# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's SVDQuant: 4-bit weights and tokens in groups of 64, smoothing, a low-rank branch.

Tensors: ``weight`` int8 (N, K / 2), two's complement nibbles, the even column in the low nibble;
``weight_scale`` bfloat16 (K / 64, N); ``weight_smooth_factor`` bfloat16 (K,), the input is divided
by it; ``weight_proj_down`` (K, R) and ``weight_proj_up`` (N, R), bfloat16, which read the raw
input. Tokens get the scale ``amax / 7`` per group. The layout is that of comfy-kitchen
(``TensorCoreSVDQuantW4A4Layout``, Apache-2.0).
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
from dtq.engines.smooth_branch import (
    branch_of,
    divided_by,
    from_divisor,
    smooth_branch_reason,
    smoothing_reason,
)
from dtq.engines.target import Loss, StoredLayer
from dtq.errors import CheckpointError

GROUP = 64
PARTS = ("weight", "weight_scale", "weight_smooth_factor", "weight_proj_down", "weight_proj_up")
RAW = {"act_unsigned": (False, None), "lowrank_branch_input_basis": ("raw", None)}
"""Keys of a marker that change the arithmetic, and their values in the layers that dtq reads."""


def encode(layer: StoredLayer) -> tuple[Tensors, Options]:
    """Tensors and marker of a layer in ``int4-g64``."""
    down, up = branch_of(layer)
    tensors = {
        "weight": layer.tensors["weight"] ^ -120,  # 0x88: raised by 8 to two's complement
        "weight_scale": layer.tensors["weight_scale"].T.contiguous(),
        "weight_smooth_factor": divided_by(layer),
        "weight_proj_down": down.T.contiguous(),
        "weight_proj_up": up,
    }
    return tensors, {"group_size": GROUP}


def decode(tensors: Tensors, options: Options, where: str) -> Decoded:
    """Inverse of :func:`encode`.

    Raises:
        CheckpointError: a shape or dtype is not that of the format, or the layer rounds tokens or
            reads its branch in a way that dtq does not have.
    """
    weight, scale, factor, down, up = (tensors[part] for part in PARTS)
    rows, columns = matrix(weight, torch.int8, where, per_byte=2)
    for key, known in RAW.items():
        if options.get(key) not in known:
            raise CheckpointError(f"{where}: {key} is {options[key]!r}; dtq reads {known[0]!r}")
    rank = down.shape[1] if down.ndim == 2 else -1
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "weight_scale": (scale, (columns // GROUP, rows)),
        "weight_smooth_factor": (factor, (columns,)),
        "weight_proj_down": (down, (columns, rank)),
        "weight_proj_up": (up, (rows, rank)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.dtype != torch.bfloat16 or tuple(tensor.shape) != shape or columns % GROUP:
            raise CheckpointError(
                f"{where}.{name}: got {described(tensor)}, expected bfloat16 {list(shape)}"
            )
    stored = {
        "weight": weight ^ -120,
        "weight_scale": scale.T.contiguous(),
        "pre_quant_scale": from_divisor(factor, f"{where}.weight_smooth_factor"),
    }
    if rank:
        stored |= {"proj_down": down.T.contiguous(), "proj_up": up}
    return (rows, columns), stored, 1


SVDQUANT = ComfyFormat(
    "svdquant_w4a4",
    "int4-g64",
    "int4-g64",
    encode,
    decode,
    PARTS,
    transform_reason=smooth_branch_reason,
    branch=True,
)

TARGET = comfy_target(
    "comfy-svdquant",
    "4-bit weights and tokens, smoothing, a low-rank branch (svdquant_w4a4): ComfyUI, "
    "comfy-kitchen",
    (SVDQUANT, INT8),
    recipe="svdquant-w4a4",
    transforms=("none", "smooth", "search"),
    transform_reason=smoothing_reason,
    loss=Loss(
        "zero points of tokens, rotation, step policy",
        "w4a4",
        1.12,
        1.11,
    ),
)
