# SPDX-License-Identifier: Apache-2.0
"""The exact size of a safetensors file before it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from dtq.formats import TensorSpec
from dtq.pipelines.stored_tensors import SAFETENSORS_DTYPES


def file_bytes(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> int:
    """Exact size of the safetensors file with these tensors and this metadata.

    Format: 8 bytes of length, a JSON header padded to a multiple of 8, the data without gaps.
    """
    # the writer sorts by dtype, widest first, then by name
    rank = list(SAFETENSORS_DTYPES)
    order = sorted(tensors, key=lambda name: (rank.index(tensors[name][1]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        shape, dtype = tensors[name]
        size = TensorSpec(tuple(shape), dtype).nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset
