# SPDX-License-Identifier: Apache-2.0
"""torchao: a diffusers folder whose weights are torchao's tensors, for diffusers' ``torchao``.

A quantized linear has ``NAME._weight_qdata`` int8 (N, K), ``NAME._weight_scale`` float32 (N, K /
group) and, with integers below 8 bits, ``NAME._weight_zero_point`` int8. The metadata of the file
says for each tensor which class of torchao it becomes: ``Int8Tensor``, whose tokens are int8 with
one scale each, or ``IntxUnpackedToInt8Tensor``, which stores 4-bit integers as int8 and rounds
tokens to int8 with a zero point. The layout is that of torchao 0.16 to 0.18 (BSD-3-Clause).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtq.engines import model_folder
from dtq.engines.target import (
    INT4_GROUPS,
    Contents,
    Limits,
    Loss,
    StoredLayer,
    Target,
    common_reason,
)
from dtq.errors import CheckpointError
from dtq.formats import FORMATS
from dtq.formats.packing import pack_bits, unpack_bits
from dtq.io.atomic import atomic_directory
from dtq.io.safe_parse import parse_json
from dtq.plan.layers import LayerSpec

NAMES = "tensor_names"
"""Key of the metadata, a list of the tensors that are described there."""
INT8, INT4 = "Int8Tensor", "IntxUnpackedToInt8Tensor"
PLAIN = {"_type": "Tensor"}
TOKENS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}
"""How an ``Int8Tensor`` rounds tokens."""
TOKENS_INT4 = "int8_asym_per_token"
"""How an ``IntxUnpackedToInt8Tensor`` does."""
QUANT_TYPE = {
    "_type": "Int8DynamicActivationInt8WeightConfig",
    "_version": 2,
    "_data": {
        "act_mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
        "reduce_range": False,
        "set_inductor_config": True,
        "weight_only_decode": False,
    },
}
"""What diffusers needs to choose its ``torchao``; the layers are as their metadata says."""

FORMAT_OF: dict[tuple[str, int | None], str] = {
    (INT8, None): "int8-row",
    (INT8, 64): "int8-g64",
    **{(INT4, group): f"int4-asym-g{group}" for group in INT4_GROUPS.values()},
}
"""Weight format by class and group; 4-bit integers without zero points lose ``-asym``."""

LIMITS = Limits(
    formats={
        "int8-row": ("int8-row", "none"),
        "int8-g64": ("none",),
        **dict.fromkeys(INT4_GROUPS, ("int8-row", "none")),
    },
    recipe="torchao-w8a8",
    fallbacks=("int8-g64", "int8-row"),
)


def write(contents: Contents, path: Path) -> None:
    """Write a folder; equal contents give equal bytes."""
    tensors, about = dict(contents.others), dict.fromkeys(contents.others, PLAIN)
    for name, layer in contents.layers.items():
        stored, described = encode(layer, contents.compute_dtype or "float32")
        tensors |= {f"{name}._weight_{key}": tensor for key, tensor in stored.items()}
        about[f"{name}.weight"] = described
    metadata = {name: json.dumps(value) for name, value in about.items()}
    metadata[NAMES] = json.dumps(sorted(about))
    quantization = {
        "quant_method": "torchao",
        "quant_type": {"default": QUANT_TYPE},
        "modules_to_not_convert": None,
    }
    with atomic_directory(path, overwrite=True) as draft:
        model_folder.save(draft, contents, tensors, quantization=quantization, metadata=metadata)


def encode(layer: StoredLayer, dtype: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a layer by the end of their names, and the metadata of its weight.

    Args:
        layer: in one of the formats of ``LIMITS``.
        dtype: of the products with it.
    """
    kind, (_, columns), tensors = layer.spec.weight_format, layer.shape, layer.tensors
    quantized = layer.spec.activation_format != "none"
    scale = tensors["weight_scale"].float()
    torch_dtype = {"_type": "torch.dtype", "_data": dtype}
    if kind not in INT4_GROUPS:
        group = FORMATS[kind].group or columns
        data: dict[str, Any] = {
            "act_quant_kwargs": TOKENS if quantized else None,
            "block_size": [1, group],
            "dtype": torch_dtype,
            "reduce_range": False,
        }
        stored = {"qdata": tensors["weight"], "scale": scale}
        return stored, {"_type": INT8, "_data": data, "_tensor_data_names": list(stored)}
    zero = tensors.get("weight_zero_point")
    stored = {
        "qdata": (unpack_bits(tensors["weight"], 4).to(torch.int16) - 8).to(torch.int8),
        "scale": scale,
        "zero_point": torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero - 8,
    }
    data = {
        "activation_quantization": TOKENS_INT4 if quantized else None,
        "block_size": [1, INT4_GROUPS[kind]],
        "dtype": torch_dtype,
        "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
    }
    return stored, {"_type": INT4, "_data": data, "_tensor_data_names": list(stored)}


def read(path: Path) -> Contents:
    """Read a folder.

    Raises:
        CheckpointError: a file is damaged, or a tensor is of a class or layout that dtq does not
            read; names it.
    """
    stored = model_folder.read(path)
    file, metadata = stored.file, stored.metadata
    names = _parsed(metadata.get(NAMES, ""), f"{file}: {NAMES}", list)
    layers = {}
    for key in names:
        about = _parsed(str(metadata.get(str(key), "")), f"{file}: {key}", dict)
        if about.get("_type") != PLAIN["_type"]:
            name, _, weight = str(key).rpartition(".")
            if not name or weight != "weight":
                raise CheckpointError(f"{file}: {key} is quantized, and no weight of a layer")
            layers[name] = _layer(stored.tensors, name, about, f"{file}: {name}")
    return stored.contents(layers)


def _parsed(text: str, where: str, kind: type) -> Any:
    value = parse_json(text, where)
    if not isinstance(value, kind):
        raise CheckpointError(f"{where}: expected a {kind.__name__}, got {text!r}"[:300])
    return value


def _layer(tensors: dict[str, Tensor], name: str, about: Any, where: str) -> StoredLayer:
    """A layer from its tensors, which are removed, and the metadata of its weight."""
    kind, data = about.get("_type"), about.get("_data")
    listed = about.get("_tensor_data_names")
    if kind not in (INT8, INT4) or not isinstance(data, dict) or not isinstance(listed, list):
        raise CheckpointError(f"{where}: is {kind!r}; dtq reads {INT8} and {INT4}")
    stored = {str(part): tensors.pop(f"{name}._weight_{part}", None) for part in listed}
    qdata, scale, zero = (stored.pop(part, None) for part in ("qdata", "scale", "zero_point"))
    if stored or qdata is None or scale is None or (kind == INT4 and zero is None):
        raise CheckpointError(f"{where}: has {listed}, which {kind} does not have in dtq")
    if qdata.dtype != torch.int8 or qdata.ndim != 2:
        raise CheckpointError(f"{where}: qdata is {qdata.dtype} {list(qdata.shape)}")
    rows, columns = qdata.shape
    block = data.get("block_size")
    group = block[1] if isinstance(block, list) and len(block) == 2 and block[0] == 1 else 0
    own_group = None if kind == INT8 and group == columns else group
    weight_format = FORMAT_OF.get((kind, own_group)) if type(group) is int else None
    if weight_format is None:
        raise CheckpointError(f"{where}: dtq does not read {kind} with block_size {block!r}")
    if not scale.is_floating_point() or tuple(scale.shape) != (rows, columns // group):
        raise CheckpointError(f"{where}: scale is {scale.dtype} {list(scale.shape)}")
    if zero is not None and (zero.dtype != torch.int8 or zero.shape != scale.shape):
        raise CheckpointError(f"{where}: zero_point is {zero.dtype} {list(zero.shape)}")
    read_as = _int8 if kind == INT8 else _int4
    packed = read_as(qdata, scale, zero, data, where)
    if kind == INT4 and "weight_zero_point" not in packed:
        weight_format = weight_format.replace("-asym", "")
    return StoredLayer(
        LayerSpec(weight_format, _tokens(kind, data, where)), (rows, columns), packed
    )


def _tokens(kind: str, data: dict[str, Any], where: str) -> str:
    key, runs = (
        ("act_quant_kwargs", TOKENS) if kind == INT8 else ("activation_quantization", TOKENS_INT4)
    )
    if data.get(key) not in (None, runs):
        raise CheckpointError(f"{where}: dtq does not read {key} {data[key]!r}"[:300])
    return "none" if data.get(key) is None else "int8-row"


def _int8(
    qdata: Tensor, scale: Tensor, zero: Tensor | None, data: dict[str, Any], where: str
) -> dict[str, Tensor]:
    if (zero is not None and bool(zero.any())) or bool((qdata == -128).any()):
        raise CheckpointError(f"{where}: has zero points or -128; dtq reads symmetric int8")
    if scale.shape[1] == 1:
        return {"weight": qdata, "weight_scale": scale.float()}
    return {"weight": qdata, "weight_scale": _bfloat16(scale, where)}


def _int4(
    qdata: Tensor, scale: Tensor, zero: Tensor | None, data: dict[str, Any], where: str
) -> dict[str, Tensor]:
    assert zero is not None
    target = data.get("target_dtype")
    if target != {"_type": "torch.dtype", "_data": "int4"}:
        raise CheckpointError(f"{where}: dtq reads integers of 4 bits, not {target!r}"[:300])
    outside = (qdata < -8).any() | (qdata > 7).any() | (zero < -8).any() | (zero > 7).any()
    if bool(outside):
        raise CheckpointError(f"{where}: has integers that are not 4 bits")
    packed = {
        "weight": pack_bits((qdata + 8).to(torch.uint8), 4),
        "weight_scale": _bfloat16(scale, where),
    }
    if bool(zero.any()):
        packed["weight_zero_point"] = zero + 8
    return packed


def _bfloat16(scale: Tensor, where: str) -> Tensor:
    rounded = scale.to(torch.bfloat16)
    if not torch.equal(rounded.to(scale.dtype), scale):
        raise CheckpointError(f"{where}: scales of groups are not bfloat16, as those of dtq are")
    return rounded


TARGET = Target(
    "torchao",
    "a folder with int8 or 4-bit weights and int8 tokens, or weight-only: diffusers' torchao",
    "",
    LIMITS,
    partial(common_reason, limits=LIMITS),
    write,
    read,
    partial(model_folder.is_quantized_by, method="torchao"),
    original_names=False,
    loss=Loss(
        "rotation, smoothing, two-level integers, low-rank branch, step policy, static scales",
        "w8a8",
        3.87,
        562.52,
    ),
)
