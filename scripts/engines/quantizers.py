# SPDX-License-Identifier: Apache-2.0
"""The quantizers that engines have themselves and that need no data: ``QUANTIZERS`` lists them."""

from __future__ import annotations

import by_comfy_kitchen
import by_ggml
import by_modelopt
import by_nncf
import by_onnxruntime
import by_torchao
from data_free import Quantizer, file_of

QUANTIZERS: dict[str, Quantizer] = {
    "convrot-w8a8": by_comfy_kitchen.QUANTIZER,
    "convrot-w4a8": by_comfy_kitchen.QUANTIZER,
    "convrot-w4a4": by_comfy_kitchen.QUANTIZER,
    "gguf-q4": by_ggml.QUANTIZER,
    "gguf-q3": by_ggml.QUANTIZER,
    "gguf-q2": by_ggml.QUANTIZER,
    "comfy-nvfp4": by_comfy_kitchen.QUANTIZER,
    "comfy-fp8": by_comfy_kitchen.QUANTIZER,
    "modelopt-fp8": by_modelopt.QUANTIZER,
    "torchao-w8a8": by_torchao.QUANTIZER,
    "torchao-w4a8": by_torchao.QUANTIZER,
    "onnx-w4a16": by_onnxruntime.QUANTIZER,
    "openvino-w8a8": by_nncf.QUANTIZER,
    "openvino-w4a16": by_nncf.QUANTIZER,
}
"""By recipe."""

__all__ = ["QUANTIZERS", "Quantizer", "file_of"]
