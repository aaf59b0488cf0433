# SPDX-License-Identifier: Apache-2.0
"""The checkpoint, recipe and machine that a metric value belongs to."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

import torch
from torch import nn


def fingerprint(model: nn.Module, *others: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of every tensor of a model, 16 hex digits.

    For several models it is the digest of their fingerprints.
    """
    if others:
        return digest([fingerprint(each) for each in (model, *others)])
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)  # type: ignore[arg-type]
    return sha.hexdigest()[:16]


def digest(data: Any) -> str:
    """SHA-256 of plain data, 16 hex digits."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def recipe_of(model: nn.Module, *others: nn.Module) -> str:
    """The recipe in the quantization config of a model; ``float`` for a model without one.

    For several models it lists each of their recipes once.
    """
    if others:
        return ", ".join(dict.fromkeys(recipe_of(each) for each in (model, *others)))
    config = getattr(model, "config", {}).get("quantization_config")
    if config is None:
        return "float"
    recipe = config.get("recipe") if isinstance(config, dict) else getattr(config, "recipe", None)
    return str(recipe or "unknown")


def hardware(model: nn.Module) -> str:
    """The device of a model, such as ``cpu x86_64 AVX512`` or ``NVIDIA H200 sm_90``."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
