# SPDX-License-Identifier: Apache-2.0
"""The checkpoint, recipe and machine that a metric value belongs to."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dtq.io import checksum
from dtq.io.checksum import tensor_bytes
from dtq.nn.attention import int8_attention_modules


def fingerprint(model: nn.Module, *others: nn.Module) -> str:
    """SHA-256 of every tensor of a model, and of which attention is int8, 16 hex digits.

    Of a tensor count the name, dtype, shape and bytes.

    For several models it is the digest of their fingerprints.
    """
    if others:
        return digest([fingerprint(each) for each in (model, *others)])

    def chunks() -> Iterator[bytes | memoryview]:
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode()
            yield tensor_bytes(tensor)
        for name in int8_attention_modules(model):
            yield f"int8 attention {name}\n".encode()

    return checksum.digest(chunks())[:16]


def digest(data: Any) -> str:
    """SHA-256 of plain data, 16 hex digits."""
    return checksum.bytes_digest(json.dumps(data, sort_keys=True).encode())[:16]


def recipe_of(model: nn.Module, *others: nn.Module) -> str:
    """The recipe in the quantization config of a model, or the name of another library's method.

    ``float`` for a model without a config.

    For several models it lists each of their recipes once.
    """
    if others:
        return ", ".join(dict.fromkeys(recipe_of(each) for each in (model, *others)))
    own = getattr(model, "config", {})
    config = getattr(own, "quantization_config", None)  # of transformers
    if config is None and hasattr(own, "get"):
        config = own.get("quantization_config")
    if config is None:
        return "float"
    if not isinstance(config, dict):
        config = config.to_dict()
    return str(config.get("recipe") or config.get("quant_method") or "unknown")


def hardware(model: nn.Module) -> str:
    """The device of a model, such as ``cpu x86_64 AVX512`` or ``NVIDIA H200 sm_90``."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
