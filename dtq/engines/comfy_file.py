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

from dtq.engines.convrot import convrot_reason
from dtq.engines.target import (
    Contents,
    Limits,
    Loss,
    StoredLayer,
    Target,
    any_knobs,
    any_shape,
    common_reason,
)
from dtq.errors import CheckpointError
from dtq.io.atomic import atomic_save_tensors
from dtq.io.safe_parse import parse_json
from dtq.linalg.hadamard import regular_signs
from dtq.pipelines.weight_files import open_header
from dtq.plan.layers import LayerPlan, LayerSpec

MARKER = "comfy_quant"
LARGEST_MARKER = 4096  # bytes; real ones have about 100
METADATA = "dtq"
WEIGHT_ONLY = "full_precision_matrix_mult"
"""Key of a marker: the engine decodes the weight and multiplies in the compute dtype."""

Tensors = dict[str, Tensor]
Options = dict[str, Any]

Decoded = tuple[tuple[int, int], Tensors, int]
"""(N, K), the tensors of the layer, and the block of the rotation of ConvRot, 1 for none."""


@dataclass(frozen=True)
class ComfyFormat:
    """How ComfyUI stores a linear.

    Attributes:
        marker: the value of ``format`` in the marker.
        weight_format: key of ``FORMATS`` that has the same numbers.
        activations: activation format that it runs with.
        encode: the tensors of a layer, by the end of their names, and the other keys of its marker.
        decode: the inverse; gets the tensors, the marker and the name of the layer.
        tensors: ends of the names of its tensors.
        optional: those of other tensors that a file may have; ``decode`` decides about them.
        weight_only: whether it runs with float activations, too.
        also: other weight formats with the same numbers.
        shape_reason: as in :class:`Limits`, for layers of this format.
        transform_reason: why it does not have the input transform of a layer; None if it has.
        branch: whether it has a low-rank branch.
    """

    marker: str
    weight_format: str
    activations: str
    encode: Callable[[StoredLayer], tuple[Tensors, Options]]
    decode: Callable[[Tensors, Options, str], Decoded]
    tensors: tuple[str, ...] = ("weight", "weight_scale")
    optional: tuple[str, ...] = ()
    weight_only: bool = False
    also: tuple[str, ...] = ()
    shape_reason: Callable[[LayerSpec, tuple[int, int]], str | None] = any_shape
    transform_reason: Callable[[StoredLayer], str | None] = convrot_reason
    branch: bool = False

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Keys of ``FORMATS`` that it stores."""
        return (self.weight_format, *self.also)


BY_MARKER: dict[str, ComfyFormat] = {}
"""Every format that dtq reads, filled by :func:`comfy_target`; a file may mix them."""


def comfy_target(
    name: str,
    about: str,
    formats: Sequence[ComfyFormat],
    recipe: str,
    transforms: tuple[str, ...],
    transform_reason: Callable[[LayerPlan], str | None] = any_knobs,
    *,
    loss: Loss,
) -> Target:
    """A target whose files hold layers of some of ComfyUI's formats.

    Args:
        name: of the target.
        about: one line.
        formats: what its files may hold, the last as a fallback, weight-only.
        recipe: a shipped recipe that fits.
        transforms: methods whose transforms it runs.
        transform_reason: as in :class:`Limits`.
        loss: against dtq's own formats.
    """
    by_format = {key: each for each in formats for key in each.weight_formats}
    BY_MARKER.update({each.marker: each for each in formats})

    def shape_reason(spec: LayerSpec, shape: tuple[int, int]) -> str | None:
        return by_format[spec.weight_format].shape_reason(spec, shape)

    limits = Limits(
        formats={
            key: (each.activations, "none") if each.weight_only else (each.activations,)
            for key, each in by_format.items()
        },
        recipe=recipe,
        transforms=transforms,
        fallbacks=(formats[-1].weight_format,),
        shape_reason=shape_reason,
        transform_reason=transform_reason,
        branch=tuple((each.weight_format, each.activations) for each in formats if each.branch),
    )

    def unsupported_reason(layer: StoredLayer) -> str | None:
        reason = common_reason(layer, limits)
        return reason or by_format[layer.spec.weight_format].transform_reason(layer)

    return Target(
        name,
        about,
        ".safetensors",
        limits,
        unsupported_reason,
        lambda contents, path: write(contents, path, by_format),
        read,
        has_markers,
        loss=loss,
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
    own = {key: getattr(contents, key) for key in ("config", "recipe", "compute_dtype")}
    atomic_save_tensors(path, tensors, {"format": "pt", METADATA: json.dumps(own, sort_keys=True)})


def read(path: Path) -> Contents:
    """Read a file.

    Args:
        path: a safetensors file with markers.

    Raises:
        CheckpointError: the file is damaged, a marker is unknown, or a layer lacks a tensor; names
            the layer.
    """
    tensors, metadata = _tensors(path)
    layers = {}
    for key in [key for key in tensors if key.endswith(f".{MARKER}")]:
        name = key.removesuffix(f".{MARKER}")
        options = _marker(tensors.pop(key), f"{path}: {key}")
        fmt = BY_MARKER.get(str(options.get("format")))
        if fmt is None:
            raise CheckpointError(
                f"{path}: {key} is {options.get('format')!r}; dtq reads {', '.join(BY_MARKER)}"
            )
        parts = (*fmt.tensors, *fmt.optional)
        stored = {part: tensors.pop(f"{name}.{part}", None) for part in parts}
        missing = [part for part in fmt.tensors if stored[part] is None]
        if missing:
            raise CheckpointError(f"{path}: {name}.{missing[0]} is missing, for {fmt.marker}")
        present = {part: tensor for part, tensor in stored.items() if tensor is not None}
        shape, packed, block = fmt.decode(present, options, f"{path}: {name}")
        activations = "none" if options.get(WEIGHT_ONLY) else fmt.activations
        layers[name] = _stored_layer(fmt.weight_format, activations, shape, packed, block)
    own = parse_json(metadata.get(METADATA, "{}"), f"{path}: metadata {METADATA!r}")
    if not isinstance(own, dict) or not isinstance(own.get("config", {}), dict):
        raise CheckpointError(f"{path}: the metadata {METADATA!r} is damaged")
    recipe, dtype = (str(own.get(key, "")) for key in ("recipe", "compute_dtype"))
    return Contents(layers, tensors, own.get("config", {}), recipe, dtype)


def _stored_layer(
    weight_format: str, activations: str, shape: tuple[int, int], tensors: Tensors, block: int
) -> StoredLayer:
    if block > 1:
        signs = regular_signs(block).repeat(shape[1] // block).to(torch.bfloat16)
        tensors = {**tensors, "pre_quant_scale": signs.reshape(1, -1)}
    rank = len(tensors["proj_down"]) if "proj_down" in tensors else 0
    spec = LayerSpec(weight_format, activations, block, "pre_quant_scale" in tensors, rank)
    return StoredLayer(spec, shape, tensors)


def matrix(weight: Tensor, dtype: torch.dtype, where: str, per_byte: int = 1) -> tuple[int, int]:
    """(N, K) of a stored weight.

    Args:
        weight: as stored, (N, K / ``per_byte``).
        dtype: that it must have.
        where: name of the layer, for messages.
        per_byte: weights in one stored value.

    Raises:
        CheckpointError: it has another dtype, or is no matrix.
    """
    if weight.dtype != dtype or weight.ndim != 2:
        name, width = str(dtype).removeprefix("torch."), "K" if per_byte == 1 else f"K / {per_byte}"
        raise CheckpointError(
            f"{where}.weight: expected {name} (N, {width}), got {described(weight)}"
        )
    return weight.shape[0], per_byte * weight.shape[1]


def described(tensor: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    with open_header(path) as opened:
        metadata = opened.metadata() or {}
        return {key: opened.get_tensor(key) for key in opened.keys()}, metadata  # noqa: SIM118


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


def has_markers(path: Path) -> bool:
    """Whether a file is one of ComfyUI's with quantized layers."""
    try:
        with safe_open(path, framework="pt") as opened:
            return any(key.endswith(f".{MARKER}") for key in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False  # no safetensors file: another target may know it
