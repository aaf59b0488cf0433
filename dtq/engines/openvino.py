# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: the whole model as an IR, a ``.xml`` file with its weights in the ``.bin`` next to it.

OpenVINO's own converter makes the IR from an ONNX graph. A linear (N, K) is a ``MatMul`` with

- int8 weights with one scale per row: a constant i8 (N, K), ``Convert``, ``Multiply`` by (N, 1);
- weights in groups: a constant u4 or u8 (N, K / group, group), ``Subtract`` of the zero points,
  ``Multiply`` by the scales, from ONNX Runtime's operator ``MatMulNBits``.

OpenVINO keeps such constants as they are and rounds the tokens itself, where a runtime option asks
for it: to int8 with a scale for each group of columns. The IR sets that option, to ``TOKEN_GROUP``
columns if a layer has int8 tokens, and to 0 (float tokens) otherwise. It is one option for all
layers, but the CPU plugin leaves the tokens of weights with float zero points as they are: so
weight-only layers have these, in a model with int8 tokens, too. dtq does not read such files.
"""

from __future__ import annotations

import json
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dtq.engines.onnx_graph import ARGUMENTS, BlockLinear, operator, trace, unsigned
from dtq.engines.target import (
    INT4_GROUPS,
    Contents,
    Limits,
    Loss,
    StoredLayer,
    Target,
    common_reason,
)
from dtq.errors import InputError
from dtq.io.safe_parse import parse_json

TOKEN_GROUP = 32
"""Columns of a token with one scale; OpenVINO's default on CPUs, and it divides every group."""
OPTION = ("runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
"""Where an IR has it."""
CONFIG, RECIPE = ("dtq", "config"), ("dtq", "recipe")
"""Where the IR has the model's config with ``ARGUMENTS``, as JSON, and the recipe."""
DATA = ".bin"

LIMITS = Limits(
    formats={
        "int8-row": ("int8-row", "none"),
        "int8-g64": ("none",),
        **dict.fromkeys(INT4_GROUPS, ("int8-row", "none")),
    },
    recipe="openvino-w8a8",
    fallbacks=("int8-g64", "int8-row"),
)


class RowLinear(nn.Module):
    """int8 weights with one scale per row, in operators of ONNX; unsigned if weight-only."""

    def __init__(self, layer: StoredLayer, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        self.tokens = layer.spec.activation_format != "none"
        weight = layer.tensors["weight"]  # (N, K)
        self.register_buffer("weight", weight if self.tokens else unsigned(weight))
        self.register_buffer("scale", layer.tensors["weight_scale"].float().reshape(-1))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product (..., N) of float32 (..., K)."""
        if self.tokens:
            stored, shape = (self.weight, self.scale), tuple(self.weight.shape)
            weight = operator("DequantizeLinear", stored, {"axis": 0}, torch.float32, shape)
        else:
            weight = (self.weight.float() - 128.0) * self.scale[:, None]
        y = x @ weight.T
        return y if self.bias is None else y + self.bias


def module_of(layer: StoredLayer, bias: Tensor | None) -> nn.Module:
    """The operators of a layer.

    Args:
        layer: in one of the formats of ``LIMITS``.
        bias: float (N,), or None.
    """
    bias = None if bias is None else bias.float()
    if layer.spec.weight_format == "int8-row":
        return RowLinear(layer, bias)
    return BlockLinear(layer, bias, float_zero=layer.spec.activation_format == "none")


def write(contents: Contents, path: Path) -> None:
    """Write the IR, and its data next to it.

    Raises:
        InputError: dtq has no random inputs for the class of the model, with which it is traced;
            a file cannot be written.
    """
    import openvino

    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")
    tokens = any(layer.spec.activation_format != "none" for layer in contents.layers.values())
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            graph, draft = Path(folder, "model.onnx"), Path(folder, path.name)
            config = {**contents.config, ARGUMENTS: trace(contents, module_of, graph)}
            model = openvino.convert_model(graph)
            for node in model.get_parameters():  # it may have the name of a slice of it, too
                node.output(0).set_names({node.get_friendly_name()})
            model.set_rt_info(str(TOKEN_GROUP if tokens else 0), list(OPTION))
            model.set_rt_info(json.dumps(config, sort_keys=True), list(CONFIG))
            model.set_rt_info(contents.recipe, list(RECIPE))
            openvino.save_model(model, draft, compress_to_fp16=False)
            del model  # it maps the graph
            os.replace(draft.with_suffix(DATA), path.with_suffix(DATA))
            os.replace(draft, path)
    except OSError as error:
        raise InputError(f"{path}: could not be written ({error})") from error


def describe(path: Path) -> Contents:
    """What an IR says about its graph: the config of the model, with ``ARGUMENTS``.

    Raises:
        InputError: dtq did not write it.
    """
    import openvino

    model = openvino.Core().read_model(path)
    if not model.has_rt_info(list(CONFIG)):
        raise InputError(f"{path} does not name its diffusers model; dtq export writes such files")
    config = parse_json(model.get_rt_info(list(CONFIG)).astype(str), f"{path}: config")
    if not isinstance(config, dict):
        raise InputError(f"{path}: config is damaged")
    return Contents({}, {}, config, model.get_rt_info(list(RECIPE)).astype(str))


def is_openvino(path: Path) -> bool:
    """Whether a file is the ``.xml`` of an IR."""
    if path.suffix != ".xml":
        return False
    with path.open("rb") as file:
        return b"<net " in file.read(200)


TARGET = Target(
    "openvino",
    "an IR with int8 or 4-bit weights, and int8 tokens or float ones: OpenVINO",
    ".xml",
    LIMITS,
    partial(common_reason, limits=LIMITS),
    write,
    recognizes=is_openvino,
    describe=describe,
    companions=(DATA,),
    packages=("openvino", "onnx", "onnxscript"),
    original_names=False,
    loss=Loss(
        "rotation, smoothing, low-rank branch, step policy, static scales",
        "w8a8",
        3.87,
        562.52,
    ),
)
