# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's files by the package comfy-kitchen, whose layouts and products ComfyUI uses.

ComfyUI's own loader is not a package. This one does what it does: a marker names the layout, the
layer's other tensors become a ``QuantizedTensor``, and ``torch.nn.functional.linear`` dispatches to
the engine. The layouts are those of comfy-kitchen 0.2.40 (Apache-2.0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dtq.engines.original import KeyMap, names_of_file
from dtq.engines.original.contents import PREFIX
from dtq.engines.runtimes.engine import Engine, EngineFile, unquantized
from dtq.errors import CheckpointError

MARKER = ".comfy_quant"


@dataclass(frozen=True)
class Layout:
    """A layout of comfy-kitchen.

    Attributes:
        name: of the layout.
        tensors: its parameters that are tensors, by the end of their names in a file.
        options: its parameters that are keys of the marker, where the marker has them.
        per_byte: weights in one stored value.
        computes: whether it multiplies in the dtype of its tensors.
    """

    name: str
    tensors: Mapping[str, str]
    options: tuple[str, ...] = ()
    per_byte: int = 2
    computes: bool = False


LAYOUTS = {
    "int8_tensorwise": Layout(
        "TensorWiseINT8Layout",
        {"scale": "weight_scale"},
        ("convrot", "convrot_groupsize"),
        per_byte=1,
    ),
    "asym_w4a8_int8": Layout(
        "AsymW4A8Int8Layout",
        {
            "scale": "weight_s_rel",
            "s_channel": "weight_s_channel",
            "codebook": "weight_codebook",
        },
        ("group_size", "convrot_groupsize"),
    ),
    "convrot_w4a4": Layout(
        "TensorCoreConvRotW4A4Layout",
        {"scale": "weight_scale"},
        ("convrot_groupsize", "quant_group_size", "linear_dtype"),
    ),
    "nvfp4": Layout(
        "TensorCoreNVFP4Layout", {"scale": "weight_scale_2", "block_scale": "weight_scale"}
    ),
    "float8_e4m3fn": Layout("TensorCoreFP8Layout", {"scale": "weight_scale"}, per_byte=1),
    "svdquant_w4a4": Layout(
        "TensorCoreSVDQuantW4A4Layout",
        {key: f"weight_{key}" for key in ("scale", "proj_down", "proj_up", "smooth_factor")},
        computes=True,
    ),
}
"""By marker."""


def _quantized(tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """A weight as comfy-kitchen's tensor.

    Args:
        tensors: of the layer, by the end of their names.
        options: the marker.
        dtype: of the products.
    """
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    layout, codes = LAYOUTS[options["format"]], tensors["weight"]
    params: dict[str, Any] = {key: tensors[end] for key, end in layout.tensors.items()}
    if layout.computes:
        params = {key: tensor.to(dtype) for key, tensor in params.items()}
    params |= {key: options[key] for key in layout.options if key in options}
    shape = (codes.shape[0], layout.per_byte * codes.shape[1])
    made = get_layout_class(layout.name).Params(orig_dtype=dtype, orig_shape=shape, **params)
    return QuantizedTensor(codes, layout.name, made)


class JoinedRows(nn.Module):
    """Some rows of a linear that the file has as one."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.rows = weight, bias, rows

    def forward(self, x: Tensor) -> Tensor:
        """The rows (..., rows) of the product with (..., K)."""
        return nn.functional.linear(x, self.weight, self.bias)[..., self.rows]


def quantized_weights(
    path: Path, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file, under the names in it.

    Args:
        path: the file.
        dtype: of the weights' products, and of weights that the file says to multiply as floats.

    Returns:
        The weight of each quantized linear by the linear's name, as comfy-kitchen's tensor; and
        the other tensors.

    Raises:
        CheckpointError: a marker names no layout of ``LAYOUTS``.
    """
    with safe_open(path, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    weights = {}
    for key in [key for key in tensors if key.endswith(MARKER)]:
        name = key.removesuffix(MARKER)
        options = json.loads(bytes(tensors.pop(key).tolist()))
        own = {
            other.removeprefix(f"{name}."): tensors.pop(other)
            for other in list(tensors)
            if other.startswith(f"{name}.weight")
        }
        if options["format"] not in LAYOUTS:
            raise CheckpointError(
                f"{path}: {name} is in {options['format']!r}, not in {[*LAYOUTS]}"
            )
        weight = _quantized(own, options, dtype)
        weights[name] = weight.dequantize() if options.get("full_precision_matrix_mult") else weight
    return weights, tensors


def load(file: EngineFile) -> nn.Module:
    """The diffusers model, whose quantized linears run in comfy-kitchen as they are stored.

    Raises:
        CheckpointError: as :func:`quantized_weights`.
    """
    weights, others = quantized_weights(file.path, file.dtype)
    made = unquantized(file)
    names = names_of_file({*others, *(f"{name}.weight" for name in weights)}, made)
    for name, weight in weights.items():
        if names is None:
            linear = made.get_submodule(name)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            continue
        bias = others.get(f"{name}.bias")
        bias = None if bias is None else bias.to(file.dtype)
        for key, rows in _rows(names, name).items():
            made.set_submodule(key, JoinedRows(weight, bias, rows))
    return made


def _rows(names: KeyMap, name: str) -> Mapping[str, Tensor]:
    """Rows of an original linear for each linear of diffusers that it has."""
    places: dict[str, dict[int, Tensor]] = {}
    at = 0
    for part in names.entries[f"{name}.weight"].parts:
        found = places.setdefault(part.key.removesuffix(".weight"), {})
        found[part.start] = torch.arange(at, at + part.rows)
        at += part.rows
    return {key: torch.cat([found[at] for at in sorted(found)]) for key, found in places.items()}


ENGINE = Engine(
    "comfy-kitchen",
    ("comfy-int8", "comfy-w4a8", "comfy-w4a4", "comfy-nvfp4", "comfy-fp8", "comfy-svdquant"),
    {"comfy_kitchen": "comfy-kitchen"},
    load,
)
