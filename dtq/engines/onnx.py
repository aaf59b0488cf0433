# SPDX-License-Identifier: Apache-2.0
"""ONNX: the whole model as a graph, for ONNX Runtime.

A folder with ``model.onnx``, its data in ``model.onnx.data`` if it is large, and ``config.json``.
Everything but the quantized linears is what ``torch.onnx`` makes of the model. A linear (N, K) is

- int8 with int8 tokens: tokens are rounded as in dtq, by their largest magnitude over 127, then
  ``MatMulInteger`` with int8 (K, N), whose int32 sums are scaled by token and channel;
- weight-only: ``com.microsoft::MatMulNBits``, uint8 (N, K / group, bytes of a group), with
  ``accuracy_level`` 1. ONNX Runtime would replace ``DequantizeLinear`` and ``MatMul`` by this
  operator with level 4, which rounds tokens to int8.

Products are in float32. dtq does not read such graphs.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dtq.engines.onnx_graph import ARGUMENTS, BlockLinear, operator, trace
from dtq.engines.target import (
    INT4_GROUPS,
    Contents,
    Limits,
    Loss,
    StoredLayer,
    Target,
    common_reason,
)
from dtq.formats.activations import row_codes, row_scale
from dtq.io.atomic import atomic_directory, atomic_write
from dtq.io.safe_parse import read_json

GRAPH, CONFIG = "model.onnx", "config.json"
RECIPE = "dtq_recipe"
"""Key of ``CONFIG``, in addition to the model's config and ``ARGUMENTS``."""

LIMITS = Limits(
    formats={
        "int8-row": ("int8-row", "none"),
        "int8-g64": ("none",),
        **dict.fromkeys(INT4_GROUPS, ("none",)),
    },
    recipe="onnx-w8a8",
    fallbacks=("int8-g64", "int8-row"),
)


class Int8Linear(nn.Module):
    """int8 weights and tokens, in operators of ONNX."""

    def __init__(self, layer: StoredLayer, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", layer.tensors["weight"].T.contiguous())  # (K, N)
        self.register_buffer("scale", layer.tensors["weight_scale"].reshape(-1))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product (..., N) of float32 (..., K)."""
        scale = row_scale(x)
        codes = row_codes(x, scale).to(torch.int8)
        shape = (*x.shape[:-1], self.weight.shape[1])
        sums = operator("MatMulInteger", (codes, self.weight), {}, torch.int32, shape)
        y = sums.float() * scale * self.scale
        return y if self.bias is None else y + self.bias


def module_of(layer: StoredLayer, bias: Tensor | None) -> nn.Module:
    """The operators of a layer.

    Args:
        layer: in one of the formats of ``LIMITS``.
        bias: float (N,), or None.
    """
    bias = None if bias is None else bias.float()
    kind = BlockLinear if layer.spec.activation_format == "none" else Int8Linear
    return kind(layer, bias)


def write(contents: Contents, path: Path) -> None:
    """Write a folder.

    Raises:
        InputError: dtq has no random inputs for the class of the model, with which it is traced.
    """
    with atomic_directory(path, overwrite=True) as draft:
        constants = trace(contents, module_of, draft / GRAPH)
        own = {RECIPE: contents.recipe, ARGUMENTS: constants}
        config = {**contents.config, **own}
        atomic_write(draft / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def describe(path: Path) -> Contents:
    """What a folder says about its graph: the config of the model, with ``ARGUMENTS``.

    Raises:
        CheckpointError: ``CONFIG`` is damaged.
    """
    config = read_json(path / CONFIG)
    return Contents({}, {}, config, str(config.get(RECIPE, "")))


def is_onnx(path: Path) -> bool:
    """Whether a folder has a graph."""
    return (path / GRAPH).is_file() and (path / CONFIG).is_file()


TARGET = Target(
    "onnx",
    "a graph with int8 products, or 8- and 4-bit weights: ONNX Runtime",
    "",
    LIMITS,
    partial(common_reason, limits=LIMITS),
    write,
    recognizes=is_onnx,
    describe=describe,
    packages=("onnx", "onnxscript"),
    original_names=False,
    loss=Loss(
        "rotation, smoothing, low-rank branch, step policy, static scales",
        "w8a8",
        3.87,
        562.52,
    ),
)
