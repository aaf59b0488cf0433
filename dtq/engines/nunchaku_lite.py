# SPDX-License-Identifier: Apache-2.0
"""Nunchaku Lite: a diffusers folder of SVDQuant layers, for diffusers' ``nunchaku_lite``.

``config.json`` lists the layers. Those with 4-bit weights and tokens (N, K) have ``qweight`` int8
(N, K / 2), ``wscales`` (K / 64, N), ``smooth_factor`` (K,), ``proj_down`` (K, R), ``proj_up`` (N,
R) and ``bias`` (N,), all in the order of :mod:`dtq.engines.nunchaku_tiles`; the config has one R
for all. Weight-only ones have ``qweight`` int32 (N / 4, K / 2), ``wscales`` and ``wzeros`` (K / 64,
N), with ``w = code * scale + zero``; their bias is as it was. The layout is that of diffusers 0.42
(Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtq.engines import model_folder
from dtq.engines.nunchaku_tiles import (
    COLUMNS,
    GROUP,
    RANK,
    ROWS,
    awq_codes,
    awq_words,
    tiled_branch,
    tiled_codes,
    tiled_down,
    tiled_scales,
    untiled_branch,
    untiled_codes,
    untiled_down,
    untiled_scales,
)
from dtq.engines.smooth_branch import (
    SMOOTHED,
    branch_of,
    divided_by,
    from_divisor,
    smooth_branch_reason,
    smoothing_reason,
)
from dtq.engines.target import Contents, Limits, Loss, StoredLayer, Target, common_reason
from dtq.errors import CheckpointError
from dtq.formats.packing import pack_bits, unpack_bits
from dtq.io.atomic import atomic_directory
from dtq.plan.layers import LayerSpec

METHOD = "nunchaku_lite"
KIND = "int4-g64"
W4A4, W4A16 = "svdq_w4a4", "awq_w4a16"
DTYPES = ("bfloat16", "float16")
LARGEST_RANK = 2**14

Tensors = dict[str, Tensor]


def write(contents: Contents, path: Path) -> None:
    """Write a folder; equal contents give equal bytes.

    Branches are filled with zeros up to the largest rank, in steps of 16; the metadata has the
    ranks.
    """
    ranks = {name: layer.spec.rank for name, layer in contents.layers.items()}
    rank = -(-max(*ranks.values(), 1) // RANK) * RANK
    tensors = dict(contents.others)
    targets: dict[str, list[str]] = {W4A4: [], W4A16: []}
    for name, layer in contents.layers.items():
        weight_only = layer.spec.activation_format == "none"
        targets[W4A16 if weight_only else W4A4].append(name)
        stored = _weight_only(layer) if weight_only else _w4a4(layer, rank)
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        if not weight_only and f"{name}.bias" in tensors:
            tensors[f"{name}.bias"] = tiled_scales(tensors[f"{name}.bias"])
    dtype = contents.compute_dtype if contents.compute_dtype in DTYPES else DTYPES[0]
    shape = {"precision": "int4", "group_size": GROUP}
    quantization: dict[str, Any] = {"quant_method": METHOD, "compute_dtype": dtype}
    if targets[W4A4]:
        quantization[W4A4] = {**shape, "rank": rank, "targets": targets[W4A4]}
    if targets[W4A16]:
        quantization[W4A16] = {**shape, "targets": targets[W4A16]}
    own = {"ranks": ranks}
    with atomic_directory(path, overwrite=True) as draft:
        model_folder.save(draft, contents, tensors, quantization=quantization, own=own)


def _w4a4(layer: StoredLayer, rank: int) -> Tensors:
    down, up = branch_of(layer, rank)
    return {
        "qweight": tiled_codes(_codes(layer)),
        "wscales": tiled_scales(layer.tensors["weight_scale"]),
        "smooth_factor": tiled_scales(divided_by(layer)),
        "proj_down": tiled_down(down),
        "proj_up": tiled_branch(up),
    }


def _weight_only(layer: StoredLayer) -> Tensors:
    scale = layer.tensors["weight_scale"].T.contiguous()
    return {"qweight": awq_words(_codes(layer) + 8), "wscales": scale, "wzeros": -8 * scale}


def _codes(layer: StoredLayer) -> Tensor:
    return unpack_bits(layer.tensors["weight"], 4).to(torch.int8) - 8


def read(path: Path) -> Contents:
    """Read a folder.

    Raises:
        CheckpointError: a file is damaged, or a layer is not what dtq reads; names it.
    """
    folder = model_folder.read(path)
    file, tensors = folder.file, folder.tensors
    ranks = folder.own.get("ranks", {})
    if not isinstance(ranks, dict):
        raise CheckpointError(f"{file}: the ranks in its metadata are damaged")
    where = f"{path / model_folder.CONFIG}: {model_folder.QUANTIZATION}"
    quantization = folder.config.get(model_folder.QUANTIZATION)
    layers = {}
    for name in _targets(quantization, W4A4, where):
        stored = _taken(tensors, name, ("qweight", "wscales", "smooth_factor"), file)
        stored |= _taken(tensors, name, ("proj_down", "proj_up"), file)
        layers[name] = _read_w4a4(stored, ranks.get(name), f"{file}: {name}")
        bias = tensors.get(f"{name}.bias")
        if bias is not None and tuple(bias.shape) == layers[name].shape[:1]:
            tensors[f"{name}.bias"] = untiled_scales(bias)
    for name in _targets(quantization, W4A16, where):
        if name in layers:
            raise CheckpointError(f"{where}: {name} is a target of {W4A4} and of {W4A16}")
        stored = _taken(tensors, name, ("qweight", "wscales", "wzeros"), file)
        layers[name] = _read_weight_only(stored, f"{file}: {name}")
    return folder.contents(layers)


def _targets(quantization: Any, kind: str, where: str) -> list[str]:
    """Names of the layers of a kind."""
    section = quantization.get(kind) if isinstance(quantization, dict) else None
    if section is None:
        return []
    targets = section.get("targets") if isinstance(section, dict) else None
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise CheckpointError(f"{where}: {kind}.targets is no list of names")
    if len(set(targets)) < len(targets):
        raise CheckpointError(f"{where}: {kind}.targets names a layer twice")
    if (section.get("precision"), section.get("group_size")) != ("int4", GROUP):
        raise CheckpointError(
            f"{where}: {kind} is {section.get('precision')!r} in groups of "
            f"{section.get('group_size')!r}; dtq reads 'int4' in groups of {GROUP}"[:300]
        )
    return targets


def _taken(tensors: Tensors, name: str, parts: tuple[str, ...], file: Path) -> Tensors:
    """Tensors of a layer, which are removed."""
    missing = [part for part in parts if f"{name}.{part}" not in tensors]
    if missing:
        raise CheckpointError(f"{file}: {name}.{missing[0]} is missing")
    return {part: tensors.pop(f"{name}.{part}") for part in parts}


def _check(
    stored: Tensors, wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], where: str
) -> None:
    for part, (dtype, shape) in wanted.items():
        tensor = stored[part]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or 0 in shape[:1]:
            raise CheckpointError(
                f"{where}.{part}: is {tensor.dtype} {list(tensor.shape)}; dtq reads {dtype} "
                f"{list(shape)}"
            )


def _read_w4a4(stored: Tensors, rank: Any, where: str) -> StoredLayer:
    weight, up = stored["qweight"], stored["proj_up"]
    rows = weight.shape[0] if weight.ndim == 2 else 0
    columns = 2 * weight.shape[1] if weight.ndim == 2 else 0
    padded = up.shape[1] if up.ndim == 2 else 0
    if rows % ROWS or columns % COLUMNS or padded % RANK or padded > LARGEST_RANK:
        raise CheckpointError(f"{where}: no {rows} rows, {columns} columns and rank {padded}")
    half = torch.bfloat16
    wanted = {
        "qweight": (torch.int8, (rows, columns // 2)),
        "wscales": (half, (columns // GROUP, rows)),
        "smooth_factor": (half, (columns,)),
        "proj_down": (half, (columns, padded)),
        "proj_up": (half, (rows, padded)),
    }
    _check(stored, wanted, where)
    tensors = {
        "weight": pack_bits(untiled_codes(weight) + 8, 4),
        "weight_scale": untiled_scales(stored["wscales"]),
        "pre_quant_scale": from_divisor(
            untiled_scales(stored["smooth_factor"]), f"{where}.smooth_factor"
        ),
    }
    down, up = untiled_down(stored["proj_down"]), untiled_branch(up)
    rank = padded if rank is None else rank
    if type(rank) is not int or not 0 <= rank <= padded or down[rank:].any() or up[:, rank:].any():
        raise CheckpointError(f"{where}: the metadata says rank {rank!r}, and more is not zero")
    if rank:
        tensors |= {"proj_down": down[:rank].contiguous(), "proj_up": up[:, :rank].contiguous()}
    return StoredLayer(LayerSpec(KIND, KIND, 1, True, rank), (rows, columns), tensors)


def _read_weight_only(stored: Tensors, where: str) -> StoredLayer:
    """A layer with zeros of a whole number of steps, such that its codes are symmetric ones."""
    words = stored["qweight"]
    rows = 4 * words.shape[0] if words.ndim == 2 else 0
    columns = 2 * words.shape[1] if words.ndim == 2 else 0
    if columns % GROUP:
        raise CheckpointError(f"{where}: {columns} columns are no multiple of {GROUP}")
    grouped = (torch.bfloat16, (columns // GROUP, rows))
    wanted = {"qweight": (torch.int32, (rows // 4, columns // 2)), "wscales": grouped}
    _check(stored, {**wanted, "wzeros": grouped}, where)
    scale = stored["wscales"].T.contiguous()
    zero = stored["wzeros"].T
    steps = torch.round(-zero.float() / scale.float())  # NaN where a scale is 0
    if not torch.equal((-steps * scale.float()).to(torch.bfloat16), zero):
        raise CheckpointError(f"{where}.wzeros: dtq reads zeros that are multiples of the scale")
    codes = awq_codes(words).unflatten(1, (-1, GROUP)) - steps.unsqueeze(-1)
    if bool((codes < -8).any() or (codes > 7).any()):
        raise CheckpointError(f"{where}: dtq reads codes from -8 to 7 around the zero")
    packed = pack_bits((codes.flatten(1) + 8).to(torch.uint8), 4)
    return StoredLayer(
        LayerSpec(KIND, "none"), (rows, columns), {"weight": packed, "weight_scale": scale}
    )


def shape_reason(spec: LayerSpec, shape: tuple[int, int]) -> str | None:
    """Why a layer of this shape cannot be stored; None if it can."""
    rows, columns = (4, GROUP) if spec.activation_format == "none" else (ROWS, COLUMNS)
    if shape[0] % rows or shape[1] % columns:
        return f"its {list(shape)} rows and columns are no multiples of {rows} and {columns}"
    return None


LIMITS = Limits(
    formats={KIND: (KIND, "none")},
    recipe="svdquant-w4a4",
    transforms=("none", "smooth", "search"),
    fallbacks=(KIND,),
    shape_reason=shape_reason,
    transform_reason=smoothing_reason,
    branch=(SMOOTHED,),
)


def unsupported_reason(layer: StoredLayer) -> str | None:
    """Why a layer cannot be stored; None if it can."""
    return common_reason(layer, LIMITS) or smooth_branch_reason(layer)


TARGET = Target(
    "nunchaku-lite",
    "a folder with 4-bit weights and tokens, smoothing, a branch: diffusers' nunchaku_lite",
    "",
    LIMITS,
    unsupported_reason,
    write,
    read,
    partial(model_folder.is_quantized_by, method=METHOD),
    original_names=False,
    loss=Loss(
        "zero points, int8 modulation, rotation, step policy",
        "w4a4",
    ),
)
