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
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dtq.engines.float_model import float_model
from dtq.engines.target import Contents, Limits, StoredLayer, Target, common_reason
from dtq.engines.traced_call import ARGUMENTS, constants_of
from dtq.formats import FORMATS
from dtq.formats.activations import row_codes, row_scale
from dtq.formats.packing import pack_bits, unpack_bits
from dtq.io.atomic import atomic_directory, atomic_write
from dtq.io.safe_parse import read_json
from dtq.pipelines.tracing import dummy_inputs

GRAPH, CONFIG = "model.onnx", "config.json"
RECIPE = "dtq_recipe"
"""Key of ``CONFIG``, in addition to the model's config and ``ARGUMENTS``."""
OPSET = 21
ROW_BLOCK = 64  # columns of a block where a row has one scale
LARGEST_GRAPH = 2**30  # bytes; a protobuf message ends at 2^31
BATCH = 2
"""Of the traced call. Sizes of 1 would become constants."""

GROUPS = {f"int4{asym}-g{group}": group for asym in ("", "-asym") for group in (32, 64, 128)}
LIMITS = Limits(
    formats={
        "int8-row": ("int8-row", "none"),
        "int8-g64": ("none",),
        **dict.fromkeys(GROUPS, ("none",)),
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
        sums = _op("MatMulInteger", (codes, self.weight), {}, torch.int32, shape)
        y = sums.float() * scale * self.scale
        return y if self.bias is None else y + self.bias


class BlockLinear(nn.Module):
    """4- or 8-bit weights in blocks of columns, in the operator of ONNX Runtime."""

    def __init__(self, layer: StoredLayer, bias: Tensor | None) -> None:
        super().__init__()
        self.bias: Tensor | None
        tensors, (rows, columns) = layer.tensors, layer.shape
        bits = 4 if layer.spec.weight_format in GROUPS else 8
        group = FORMATS[layer.spec.weight_format].group or ROW_BLOCK
        blocks = -(-columns // group)
        # unsigned: the operator takes 8 and 128 as zero points; the last block is filled with them
        codes = unpack_bits(tensors["weight"], 4) if bits == 4 else _unsigned(tensors["weight"])
        codes = nn.functional.pad(codes, (0, blocks * group - columns), value=2 ** (bits - 1))
        packed = pack_bits(codes, bits).view(torch.uint8)  # the even column in the low nibble
        scale = tensors["weight_scale"].float().expand(rows, blocks)
        zero = tensors.get("weight_zero_point")
        if zero is not None:  # a row of zero points ends on a byte
            zero = nn.functional.pad(zero.to(torch.uint8), (0, zero.shape[1] % 2), value=8)
            zero = pack_bits(zero, 4).view(torch.uint8).reshape(-1)
        self.register_buffer("weight", packed.reshape(rows, blocks, group * bits // 8))
        self.register_buffer("scale", scale.reshape(-1).contiguous())
        self.register_buffer("zero", zero)
        self.register_buffer("bias", bias)
        self.rows = rows
        self.attributes = {
            "K": columns, "N": rows, "bits": bits, "block_size": group,
            "accuracy_level": 1,  # float32 tokens; otherwise ONNX Runtime rounds them to int8
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The product (..., N) of float32 (..., K)."""
        stored = [x, self.weight, self.scale, *([] if self.zero is None else [self.zero])]
        shape = (*x.shape[:-1], self.rows)
        y = _op("com.microsoft::MatMulNBits", stored, self.attributes, torch.float32, shape)
        return y if self.bias is None else y + self.bias


def _unsigned(weight: Tensor) -> Tensor:
    """int8 raised by 128, uint8."""
    return weight.view(torch.uint8) ^ 128


def _op(name: str, inputs: Any, attributes: Any, dtype: torch.dtype, shape: Any) -> Tensor:
    domain, _, operator = name.rpartition("::")
    version = 1 if domain else OPSET
    name = f"{domain}::{operator}"
    return torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=dtype, shape=shape, version=version
    )


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
    model = float_model(contents)
    inputs = {**dummy_inputs(model, BATCH, 500.0, 0), "return_dict": False}
    for name, layer in contents.layers.items():
        model.set_submodule(name, module_of(layer, contents.others.get(f"{name}.bias")))
    large = sum(t.numel() * t.element_size() for t in model.state_dict().values()) > LARGEST_GRAPH
    sizes = tree_map(_any_size, inputs)
    with atomic_directory(path, overwrite=True) as draft:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own decompositions
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            torch.onnx.export(
                model, (), draft / GRAPH, kwargs=inputs, dynamo=True,
                dynamic_shapes=sizes, opset_version=OPSET, external_data=large,
                optimize=False, verbose=False,
            )  # fmt: skip
        own = {RECIPE: contents.recipe, ARGUMENTS: constants_of(inputs)}
        config = {**contents.config, **own}
        atomic_write(draft / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _any_size(value: Any) -> Any:
    """Every size may differ from call to call, unless the model needs it as it is."""
    if not isinstance(value, Tensor):
        return None
    return dict.fromkeys(range(value.ndim), torch.export.Dim.AUTO)


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


def unsupported_reason(layer: StoredLayer) -> str | None:
    """Why a layer cannot be stored; None if it can."""
    return common_reason(layer, LIMITS)


TARGET = Target(
    "onnx",
    "a graph with int8 products, or 8- and 4-bit weights: ONNX Runtime",
    "",
    LIMITS,
    unsupported_reason,
    write,
    recognizes=is_onnx,
    describe=describe,
    packages=("onnx", "onnxscript"),
    original_names=False,
)
