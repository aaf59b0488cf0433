# SPDX-License-Identifier: Apache-2.0
"""A model as an ONNX graph whose quantized linears are operators of a target's choice.

Everything but these is what ``torch.onnx`` makes of the model. What a target writes for a linear is
a module whose forward consists of :func:`operator`; ``BlockLinear`` is one that several use.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dtq.engines.float_model import float_model
from dtq.engines.target import INT4_GROUPS, Contents, StoredLayer
from dtq.formats import FORMATS
from dtq.formats.packing import pack_bits, unpack_bits
from dtq.pipelines.tracing import dummy_inputs

OPSET = 21
ROW_BLOCK = 64  # columns of a block where a row has one scale
LARGEST_GRAPH = 2**30  # bytes; a protobuf message ends at 2^31
BATCH = 2
"""Of the traced call. Sizes of 1 would become constants."""
ARGUMENTS = "dtq_arguments"
"""Key of a graph's config: see :func:`constants_of`."""
SWITCHES = ("return_dict",)
"""Arguments of a forward that do not change its numbers."""


def operator(name: str, inputs: Any, attributes: Any, dtype: torch.dtype, shape: Any) -> Tensor:
    """The output of one operator of ONNX, in a forward that is being traced.

    Args:
        name: of the operator, after its domain and ``::`` if that is not ONNX's own.
        inputs: tensors.
        attributes: by name.
        dtype: of the output.
        shape: of the output.
    """
    domain, _, kind = name.rpartition("::")
    version = 1 if domain else OPSET
    return torch.onnx.ops.symbolic(
        f"{domain}::{kind}", inputs, attributes, dtype=dtype, shape=shape, version=version
    )


class BlockLinear(nn.Module):
    """4- or 8-bit weights in blocks of columns, in the operator of ONNX Runtime.

    Args:
        layer: in one of ``INT4_GROUPS``, ``int8-g64`` or ``int8-row``.
        bias: float32 (N,), or None.
        float_zero: whether zero points are float32, one for each block; otherwise they are
            integers, or the operator's own.
    """

    def __init__(
        self, layer: StoredLayer, bias: Tensor | None, *, float_zero: bool = False
    ) -> None:
        super().__init__()
        self.bias: Tensor | None
        tensors, (rows, columns) = layer.tensors, layer.shape
        bits = 4 if layer.spec.weight_format in INT4_GROUPS else 8
        group = FORMATS[layer.spec.weight_format].group or ROW_BLOCK
        blocks = -(-columns // group)
        # unsigned: the operator takes 8 and 128 as zero points; the last block is filled with them
        codes = unpack_bits(tensors["weight"], 4) if bits == 4 else unsigned(tensors["weight"])
        codes = nn.functional.pad(codes, (0, blocks * group - columns), value=2 ** (bits - 1))
        packed = pack_bits(codes, bits).view(torch.uint8)  # the even column in the low nibble
        scale = tensors["weight_scale"].float().expand(rows, blocks)
        zero = tensors.get("weight_zero_point")
        if float_zero:
            middle = torch.full((rows, blocks), 2 ** (bits - 1))
            zero = (middle if zero is None else zero).float().reshape(-1)
        elif zero is not None:  # a row of zero points ends on a byte
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
        y = operator("com.microsoft::MatMulNBits", stored, self.attributes, torch.float32, shape)
        return y if self.bias is None else y + self.bias


def unsigned(weight: Tensor) -> Tensor:
    """int8 raised by 128, uint8.

    Args:
        weight: int8, of any shape.
    """
    return weight.view(torch.uint8) ^ 128


def trace(
    contents: Contents, module_of: Callable[[StoredLayer, Tensor | None], nn.Module], file: Path
) -> dict[str, Any]:
    """Write the graph of a model; its data are in ``FILE.data`` if they are large.

    Args:
        contents: of the model.
        module_of: the operators of a linear, from the layer and its bias.
        file: to write.

    Returns:
        Arguments of the traced call that are constants in the graph.

    Raises:
        InputError: dtq has no random inputs for the class of the model, with which it is traced.
    """
    model = float_model(contents)
    inputs = {**dummy_inputs(model, BATCH, 500.0, 0), "return_dict": False}
    for name, layer in contents.layers.items():
        model.set_submodule(name, module_of(layer, contents.others.get(f"{name}.bias")))
    large = sum(t.numel() * t.element_size() for t in model.state_dict().values()) > LARGEST_GRAPH
    sizes = tree_map(_any_size, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own decompositions
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            model, (), file, kwargs=inputs, dynamo=True,
            dynamic_shapes=sizes, opset_version=OPSET, external_data=large,
            optimize=False, verbose=False,
        )  # fmt: skip
    return constants_of(inputs)


def _any_size(value: Any) -> Any:
    """Every size may differ from call to call, unless the model needs it as it is."""
    if not isinstance(value, Tensor):
        return None
    return dict.fromkeys(range(value.ndim), torch.export.Dim.AUTO)


def constants_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that tracing makes a part of the graph, as plain data.

    Args:
        arguments: of the call, by name.

    Returns:
        Those that are neither a tensor nor empty nor one of ``SWITCHES``.
    """
    plain = {name: _plain(value) for name, value in arguments.items() if name not in SWITCHES}
    return {name: value for name, value in plain.items() if value is not None}


def _plain(value: Any) -> Any:
    """A value as JSON gives it back; None for a tensor and for what is empty."""
    if value is None or isinstance(value, Tensor) or value in ((), [], {}):
        return None
    return json.loads(json.dumps(value, default=repr))
