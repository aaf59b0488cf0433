# SPDX-License-Identifier: Apache-2.0
"""Tensors and bytes of weight files before they are written."""

from __future__ import annotations

import torch
from torch import nn

from dtq.checkpoint.file_size import file_bytes
from dtq.checkpoint.reader import predicted_bytes
from dtq.plan.layers import Plan
from dtq.stages.float_model import float32_modules


def file_tensors(
    model: nn.Module, plan: Plan, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor that the quantized file will hold."""
    wide = float32_modules(model, dtype)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key in tied:
            continue
        kept = torch.float32 if any(part in wide for part in key.split(".")) else dtype
        tensors[key] = (tuple(tensor.shape), kept if tensor.is_floating_point() else tensor.dtype)
    for layer in plan.quantized():
        for part, spec in layer.spec.tensor_specs(layer.shape, plan.bins).items():
            tensors[f"{layer.name}.{part}"] = (spec.shape, spec.dtype)
    return tensors


def model_bytes(model: nn.Module, plan: Plan | None, dtype: torch.dtype) -> int:
    """Exact size of the safetensors file of a model, unsharded.

    Args:
        model: the float model; the meta device will do.
        plan: of its layers. None, or a plan that quantizes none: the file of the float model.
        dtype: of what is not quantized.
    """
    if plan is not None and plan.quantized():
        return predicted_bytes(file_tensors(model, plan, dtype))
    return file_bytes(file_tensors(model, Plan("", ()), dtype), {"format": "pt"})
