# SPDX-License-Identifier: Apache-2.0
"""NNCF's ``compress_weights`` without a data set, which makes OpenVINO's compressed models.

NNCF has no 8-bit weights in groups, so modulation is ``int8-row`` in both files. Its codes, scales
and zero points are put into the IR that dtq writes. NNCF's own IR has float16 scales; here they are
widened to float32, as dtq's are.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from data_free import Quantizer, rewritten
from torch import Tensor

from dtq.engines.target import INT4_GROUPS, StoredLayer
from dtq.formats import FORMATS
from dtq.formats.packing import pack_bits, unpack_bits


def numbers(layer: StoredLayer, weight: Tensor) -> dict[str, Tensor]:
    """NNCF's numbers for one weight in dtq's tensors."""
    import nncf
    import openvino
    from openvino import opset13 as ops

    name = layer.spec.weight_format
    rows, columns = weight.shape
    tokens = ops.parameter([-1, columns], np.float32)
    product = ops.matmul(tokens, ops.constant(weight.numpy()), False, True)
    modes = nncf.CompressWeightsMode
    group = FORMATS[name].group
    if name in INT4_GROUPS:
        mode = modes.INT4_ASYM if "asym" in name else modes.INT4_SYM
        options = {"mode": mode, "group_size": group, "ratio": 1.0, "all_layers": True}
    elif group is None:
        options = {"mode": modes.INT8_SYM}
    else:
        raise ValueError(f"NNCF has no 8-bit weights in groups ({name})")
    nncf.set_log_level(logging.ERROR)
    made = nncf.compress_weights(openvino.Model([product], [tokens]), **options)
    parts = {}
    for node in made.get_ops():
        if node.get_type_name() != "Constant":
            continue
        kind, data = node.get_element_type().get_type_name(), node.get_data()
        if kind == "u4":  # two in a byte, the even one low
            codes = unpack_bits(torch.from_numpy(data.copy()).reshape(1, -1).view(torch.int8), 4)
            codes = codes.reshape(rows, -1)
            parts["codes" if codes.shape[1] == columns else "zero"] = codes
        elif kind == "i8":
            parts["codes"] = torch.from_numpy(data.copy()).reshape(rows, columns)
        elif kind in ("f16", "f32"):
            parts["scale"] = torch.from_numpy(data.astype(np.float32)).reshape(rows, -1)
    if name not in INT4_GROUPS:
        return {"weight": parts["codes"].to(torch.int8), "weight_scale": parts["scale"]}
    packed = {
        "weight": pack_bits(parts["codes"].to(torch.uint8), 4),
        "weight_scale": parts["scale"],
    }
    if "asym" in name:
        packed["weight_zero_point"] = parts["zero"].to(torch.int8)
    return packed


QUANTIZER = Quantizer(
    "openvino",
    {"nncf": "nncf"},
    rewritten("openvino", "openvino", numbers),
    overrides={"modulation": "int8-row"},
)
