# SPDX-License-Identifier: Apache-2.0
"""ggml's own quantizer (``ggml_quantize_chunk`` of the package ggml-python), by weights alone.

llama.cpp and stable-diffusion.cpp make files with it. It also takes an importance matrix, which is
data: it gets none here.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from data_free import Quantizer, rewritten
from torch import Tensor

from dtq.engines.gguf_blocks import BLOCK_TYPES, from_blocks
from dtq.engines.target import StoredLayer


def numbers(layer: StoredLayer, weight: Tensor) -> dict[str, Tensor]:
    """The blocks of ggml in the tensors of dtq, whose bytes in a file are the same again."""
    import ggml

    name, (rows, columns) = layer.spec.weight_format, weight.shape
    kind = BLOCK_TYPES[name]
    data = np.zeros((rows, columns // kind.columns * kind.nbytes), np.uint8)
    written = ggml.ggml_quantize_chunk(
        kind.number,
        weight.contiguous().numpy().ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        data.ctypes.data_as(ctypes.c_void_p), 0, rows, columns, None,
    )  # fmt: skip
    if written != data.size:
        raise RuntimeError(f"ggml wrote {written} bytes of {name}, not {data.size}")
    return from_blocks(name, torch.from_numpy(data))


QUANTIZER = Quantizer("gguf", {"ggml": "ggml-python"}, rewritten("gguf", "gguf", numbers))
