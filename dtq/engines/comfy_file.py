# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's files of quantized models: one safetensors file, a marker for each quantized layer.

A linear ``name`` has the tensors of its format under ``name.weight``, ``name.weight_scale`` and so
on, and a marker ``name.comfy_quant``: the bytes of a JSON text such as ``{"format":
"int8_tensorwise", "convrot": true, "convrot_groupsize": 256}``. All other tensors are as in a float
file. The layouts are those of the package comfy-kitchen (Apache-2.0), which executes them; the
names are those that stable-diffusion.cpp and SGLang read, too.

dtq adds the diffusers config of the model to the metadata, so that it can read the file back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtq.engines.target import Contents, Limits, StoredLayer, Target
from dtq.errors import CheckpointError
from dtq.io.atomic import atomic_save_tensors
from dtq.io.safe_parse import parse_json
from dtq.linalg.hadamard import regular_block_for, regular_columns, regular_signs
from dtq.plan.layers import LayerSpec
from dtq.transforms.base import OnlineTransform

MARKER = "comfy_quant"
LARGEST_MARKER = 4096  # bytes; real ones have about 100
METADATA = "dtq"
WEIGHT_ONLY = "full_precision_matrix_mult"
"""Key of a marker: the engine decodes the weight and multiplies in the compute dtype."""

Tensors = dict[str, Tensor]
Options = dict[str, Any]


@dataclass(frozen=True)
class ComfyFormat:
    """How ComfyUI stores a linear.

    Attributes:
        marker: the value of ``format`` in the marker.
        weight_format: key of ``FORMATS`` that has the same numbers.
        encode: the tensors of a layer, by the end of their names, and the other keys of its marker.
        decode: the inverse; gets the tensors, the marker and the name of the layer.
        tensors: ends of the names of its tensors; those after the first ``required`` may be absent.
        required: see ``tensors``.
        also: other weight formats with the same numbers.
    """

    marker: str
    weight_format: str
    encode: Callable[[StoredLayer], tuple[Tensors, Options]]
    decode: Callable[[Tensors, Options, str], StoredLayer]
    tensors: tuple[str, ...]
    required: int
    also: tuple[str, ...] = ()


def comfy_target(
    name: str,
    about: str,
    formats: Sequence[ComfyFormat],
    limits: Limits,
    unsupported_reason: Callable[[StoredLayer], str | None],
) -> Target:
    """A target whose files hold layers of some of ComfyUI's formats.

    Args:
        name: of the target.
        about: one line.
        formats: what its files may hold.
        limits: the same as a constraint on recipes.
        unsupported_reason: why a layer is none of them.
    """
    by_marker = {each.marker: each for each in formats}
    by_format = {name: each for each in formats for name in (each.weight_format, *each.also)}
    return Target(
        name,
        about,
        ".safetensors",
        limits,
        unsupported_reason,
        lambda contents, path: write(contents, path, by_format),
        lambda path: read(path, by_marker),
        lambda path: _has_only(path, by_marker),
    )


def write(contents: Contents, path: Path, formats: Mapping[str, ComfyFormat]) -> None:
    """Write a file; equal contents give equal bytes.

    Args:
        contents: layers that the formats hold, and the other tensors.
        path: the file.
        formats: by weight format of dtq.
    """
    tensors = dict(contents.others)
    for name, layer in contents.layers.items():
        fmt = formats[layer.spec.weight_format]
        stored, options = fmt.encode(layer)
        if layer.spec.activation_format == "none":
            options[WEIGHT_ONLY] = True
        text = json.dumps({"format": fmt.marker, **options}).encode()
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        tensors[f"{name}.{MARKER}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    own = json.dumps({"config": contents.config, "recipe": contents.recipe}, sort_keys=True)
    atomic_save_tensors(path, tensors, {"format": "pt", METADATA: own})


def read(path: Path, formats: Mapping[str, ComfyFormat]) -> Contents:
    """Read a file.

    Args:
        path: a safetensors file with markers.
        formats: by marker.

    Raises:
        CheckpointError: the file is damaged, a marker is not one of the formats, or a layer lacks a
            tensor; names the layer.
    """
    tensors, metadata = _tensors(path)
    layers = {}
    for key in [key for key in tensors if key.endswith(f".{MARKER}")]:
        name = key.removesuffix(f".{MARKER}")
        options = _marker(tensors.pop(key), f"{path}: {key}")
        fmt = formats.get(str(options.get("format")))
        if fmt is None:
            raise CheckpointError(
                f"{path}: {key} is {options.get('format')!r}; dtq reads {', '.join(formats)}"
            )
        stored = {part: tensors.pop(f"{name}.{part}", None) for part in fmt.tensors}
        missing = [part for part in fmt.tensors[: fmt.required] if stored[part] is None]
        if missing:
            raise CheckpointError(f"{path}: {name}.{missing[0]} is missing, for {fmt.marker}")
        present = {part: tensor for part, tensor in stored.items() if tensor is not None}
        layers[name] = fmt.decode(present, options, f"{path}: {name}")
    own = parse_json(metadata.get(METADATA, "{}"), f"{path}: metadata {METADATA!r}")
    if not isinstance(own, dict) or not isinstance(own.get("config", {}), dict):
        raise CheckpointError(f"{path}: the metadata {METADATA!r} is damaged")
    return Contents(layers, tensors, own.get("config", {}), str(own.get("recipe", "")))


def is_convrot(transform: OnlineTransform) -> bool:
    """Whether a transform is the rotation of ConvRot, up to a signed permutation of its output."""
    block, scale = transform.block, transform.scale
    if block == 1 or regular_block_for(block, block) != block or transform.perm is not None:
        return False
    signs = regular_signs(block).repeat(len(scale) // block).to(scale)
    return transform.num_rotations == 1 and torch.equal(scale, signs)


def convrot_reason(layer: StoredLayer) -> str | None:
    """Why the input transform of a layer is none that ComfyUI runs; None if it is."""
    transform = layer.transform()
    if transform is None or is_convrot(transform):
        return None
    return "its input has smoothing, random signs or another rotation than that of ConvRot"


def to_regular(codes: Tensor, block: int) -> Tensor:
    """Integer codes (N, K) under dtq's rotation as those under the regular one: ``codes A^T``."""
    grouped = codes.unflatten(1, (-1, block))
    sign = regular_signs(block).to(codes.dtype)
    return (grouped[..., regular_columns(block)] * sign).flatten(1)


def from_regular(codes: Tensor, block: int) -> Tensor:
    """Inverse of :func:`to_regular`."""
    sign = regular_signs(block).to(codes.dtype)
    return (codes.unflatten(1, (-1, block)) * sign)[..., regular_columns(block)].flatten(1)


def rotated_block(options: Options, columns: int, where: str) -> int:
    """Block of the rotation in a marker, 1 without one.

    Raises:
        CheckpointError: it is not a power of 4 that divides K.
    """
    if not options.get("convrot"):
        return 1
    block = options.get("convrot_groupsize", 256)
    if (
        type(block) is not int
        or not 4 <= block <= 2**16
        or regular_block_for(block, block) != block
    ):
        raise CheckpointError(f"{where}: convrot_groupsize {block!r} is not a power of 4")
    if columns % block:
        raise CheckpointError(f"{where}: convrot_groupsize {block} does not divide K = {columns}")
    return block


def decoded_layer(
    weight_format: str,
    shape: tuple[int, int],
    tensors: Tensors,
    options: Options,
    block: int,
    activations: str,
) -> StoredLayer:
    """A layer of dtq from the tensors of its weight format.

    Args:
        weight_format: key of ``FORMATS``.
        shape: (N, K).
        tensors: of the weight format.
        options: the marker.
        block: of the rotation, 1 for none.
        activations: activation format of layers that are not weight-only.
    """
    pre_quant = block > 1
    if pre_quant:
        signs = regular_signs(block).repeat(shape[1] // block).to(torch.bfloat16)
        tensors = {**tensors, "pre_quant_scale": signs.reshape(1, -1)}
    activations = "none" if options.get(WEIGHT_ONLY) else activations
    return StoredLayer(LayerSpec(weight_format, activations, block, pre_quant), shape, tensors)


def described(tensor: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return {key: opened.get_tensor(key) for key in opened.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); copy it again") from error


def _marker(tensor: Tensor, where: str) -> Options:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or len(tensor) > LARGEST_MARKER:
        raise CheckpointError(f"{where}: expected up to {LARGEST_MARKER} bytes of JSON")
    try:
        text = bytes(tensor.tolist()).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: is not text ({error})") from error
    options = parse_json(text, where)
    if not isinstance(options, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {text!r}"[:300])
    return options


def _has_only(path: Path, formats: Mapping[str, ComfyFormat]) -> bool:
    """Whether a file is one of ComfyUI's whose markers are all among some formats."""
    try:
        with safe_open(path, framework="pt") as opened:
            keys = [key for key in opened.keys() if key.endswith(f".{MARKER}")]  # noqa: SIM118
            markers = [_marker(opened.get_tensor(key), f"{path}: {key}") for key in keys]
    except (SafetensorError, OSError):
        return False  # no safetensors file: another target may know it
    return bool(markers) and all(str(each.get("format")) in formats for each in markers)
