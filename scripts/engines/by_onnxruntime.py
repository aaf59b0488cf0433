# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's own block quantizer, of its ``MatMulNBitsQuantizer``; weight-only.

Its ``quantize_dynamic`` is in no row: it gives all tokens of a call one scale, so its graph is
another computation than dtq's with a scale for each token.
"""

from __future__ import annotations

import numpy as np
import torch
from data_free import Quantizer, rewritten
from torch import Tensor

from dtq.engines.target import INT4_GROUPS, StoredLayer
from dtq.formats import FORMATS
from dtq.formats.packing import pack_bits, unpack_bits


def numbers(layer: StoredLayer, weight: Tensor) -> dict[str, Tensor]:
    """The operands of ``MatMulNBits`` in dtq's tensors, with ONNX Runtime's float32 scales."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    name, rows = layer.spec.weight_format, len(weight)
    group = FORMATS[name].group
    if group is None or layer.spec.activation_format != "none":
        raise ValueError(f"{name} with {layer.spec.activation_format} is not MatMulNBits")
    bits = 4 if name in INT4_GROUPS else 8
    config = DefaultWeightOnlyQuantConfig(
        block_size=group, bits=bits, is_symmetric="asym" not in name
    )
    quantized = DefaultWeightOnlyQuantizer(config).qbits_block_quant(
        np.ascontiguousarray(weight.numpy().T)
    )
    codes, scale, zero = (torch.from_numpy(part) for part in quantized)
    codes = codes.reshape(rows, -1).view(torch.int8)
    if bits == 8:
        return {"weight": codes ^ -128, "weight_scale": scale}
    packed = {"weight": pack_bits(unpack_bits(codes, 4), 4), "weight_scale": scale}
    if "asym" in name:
        packed["weight_zero_point"] = unpack_bits(zero.view(torch.int8), 4)[:, : scale.shape[1]].to(
            torch.int8
        )
    return packed


QUANTIZER = Quantizer(
    "onnx", {"onnx": "onnx", "onnxruntime": "onnxruntime"}, rewritten("onnx", "onnx", numbers)
)
