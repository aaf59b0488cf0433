# SPDX-License-Identifier: Apache-2.0
"""Runs ComfyUI's files with the package comfy-kitchen, which knows nothing of dtq.

ComfyUI's own loader is not a package. This one does what it does: a marker names the layout, the
layer's other tensors become a ``QuantizedTensor``, and ``torch.nn.functional.linear`` dispatches to the
engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor, nn


def _int8(
    tensors: dict[str, Tensor], options: dict, dtype: torch.dtype
) -> tuple[str, Tensor, dict]:
    rotation = {k: options[k] for k in ("convrot", "convrot_groupsize") if k in options}
    weight = tensors["weight"]
    shape = tuple(weight.shape)
    params = {"scale": tensors["weight_scale"], "orig_shape": shape, **rotation}
    return "TensorWiseINT8Layout", weight, params


def _w4a8(
    tensors: dict[str, Tensor], options: dict, dtype: torch.dtype
) -> tuple[str, Tensor, dict]:
    weight = tensors["weight"]
    params = {
        "scale": tensors["weight_s_rel"],
        "s_channel": tensors["weight_s_channel"],
        "codebook": tensors["weight_codebook"],
        "group_size": options["group_size"],
        "convrot_groupsize": options["convrot_groupsize"],
        "orig_shape": (weight.shape[0], 2 * weight.shape[1]),
    }
    return "AsymW4A8Int8Layout", weight, params


def _w4a4(
    tensors: dict[str, Tensor], options: dict, dtype: torch.dtype
) -> tuple[str, Tensor, dict]:
    weight = tensors["weight"]
    named = {k: options[k] for k in ("convrot_groupsize", "quant_group_size", "linear_dtype")}
    shape = (weight.shape[0], 2 * weight.shape[1])
    params = {"scale": tensors["weight_scale"], "orig_shape": shape, **named}
    return "TensorCoreConvRotW4A4Layout", weight, params


def _nvfp4(
    tensors: dict[str, Tensor], options: dict, dtype: torch.dtype
) -> tuple[str, Tensor, dict]:
    weight = tensors["weight"]
    params = {
        "scale": tensors["weight_scale_2"],
        "block_scale": tensors["weight_scale"],
        "orig_shape": (weight.shape[0], 2 * weight.shape[1]),
    }
    return "TensorCoreNVFP4Layout", weight, params


def _fp8(tensors: dict[str, Tensor], options: dict, dtype: torch.dtype) -> tuple[str, Tensor, dict]:
    weight = tensors["weight"]
    params = {"scale": tensors["weight_scale"], "orig_shape": tuple(weight.shape)}
    return "TensorCoreFP8Layout", weight, params


def _svdquant(
    tensors: dict[str, Tensor], options: dict, dtype: torch.dtype
) -> tuple[str, Tensor, dict]:
    weight = tensors["weight"]
    # the engine multiplies in the dtype of the scales
    floats = ("scale", "proj_down", "proj_up", "smooth_factor")
    params = {key: tensors[f"weight_{key}"].to(dtype) for key in floats}
    params["orig_shape"] = (weight.shape[0], 2 * weight.shape[1])
    return "TensorCoreSVDQuantW4A4Layout", weight, params


LAYOUTS: dict[str, Callable[..., tuple[str, Tensor, dict]]] = {
    "int8_tensorwise": _int8,
    "asym_w4a8_int8": _w4a8,
    "convrot_w4a4": _w4a4,
    "nvfp4": _nvfp4,
    "float8_e4m3fn": _fp8,
    "svdquant_w4a4": _svdquant,
}
"""By marker: name of the layout, the codes, its parameters."""


def quantized_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Weights of quantized linears by name, the other tensors, the config of the model."""
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    with safe_open(path, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        config = json.loads(opened.metadata()["dtq"])["config"]
    weights = {}
    for key in [key for key in tensors if key.endswith(".comfy_quant")]:
        name = key.removesuffix(".comfy_quant")
        options = json.loads(bytes(tensors.pop(key).tolist()))
        own = {
            other.removeprefix(f"{name}."): tensors.pop(other)
            for other in list(tensors)
            if other.startswith(f"{name}.weight")
        }
        layout, codes, params = LAYOUTS[options["format"]](own, options, torch.float32)
        params = get_layout_class(layout).Params(orig_dtype=torch.float32, **params)
        weight = QuantizedTensor(codes, layout, params)
        weights[name] = weight.dequantize() if options.get("full_precision_matrix_mult") else weight
    return weights, tensors, config


def model(path: Path) -> nn.Module:
    """The diffusers model of a file, whose quantized linears run in comfy-kitchen."""
    weights, others, config = quantized_weights(path)
    made = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    missing, unexpected = made.load_state_dict(others, strict=False)
    assert not unexpected
    assert {key.removesuffix(".weight") for key in missing} == set(weights)
    for name, weight in weights.items():
        made.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return made
