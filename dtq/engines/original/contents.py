# SPDX-License-Identifier: Apache-2.0
"""The contents of a file under original names, and back: rows are moved, numbers never change."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dtq.engines.original.mapping import Entry, KeyMap, Part, anonymous, key_map
from dtq.engines.target import OF_THE_CHECKPOINT, Contents, StoredLayer
from dtq.errors import CheckpointError, InputError
from dtq.formats import FORMATS

PREFIX = "model.diffusion_model."
"""Before every name in files of whole pipelines; ComfyUI reads names with and without it."""

_WEIGHT = ".weight"


def config_of(model: nn.Module) -> dict[str, Any]:
    """The diffusers config of a model, with ``_class_name``, as if it were float."""
    fields = json.loads(model.to_json_string())  # type: ignore[operator]
    return {key: value for key, value in fields.items() if key not in OF_THE_CHECKPOINT}


def joined_layers(names: KeyMap) -> dict[str, str]:
    """The original layer of each layer whose rows are a part of it."""
    return {
        _module(part.key): _module(name)
        for name, entry in names.entries.items()
        if name.endswith(_WEIGHT) and len({part.key for part in entry.parts}) > 1
        for part in entry.parts
    }


def fusion_reasons(layers: Mapping[str, StoredLayer], names: KeyMap) -> dict[str, str]:
    """Why quantized layers cannot be rows of one original tensor, by name.

    Args:
        layers: quantized layers, by their names in diffusers.
        names: the map.
    """
    reasons: dict[str, str] = {}
    for name, entry in names.entries.items():
        modules = list(dict.fromkeys(_module(part.key) for part in entry.parts))
        quantized = [module for module in modules if module in layers]
        if not name.endswith(_WEIGHT) or not quantized:
            continue
        reason = _reason(name, modules, layers)
        reasons |= dict.fromkeys(quantized, reason) if reason else {}
    return reasons


def to_original(contents: Contents, names: KeyMap) -> Contents:
    """The contents with original names.

    Args:
        contents: with the names of diffusers; :func:`fusion_reasons` has none for its layers.
        names: the map of its model.

    Raises:
        InputError: a tensor of the model is missing, or tensors of one original one differ in
            dtype.
    """
    layers: dict[str, StoredLayer] = {}
    others: dict[str, Tensor] = {}
    for name, entry in names.entries.items():
        if _module(entry.parts[0].key) in contents.layers and name.endswith(_WEIGHT):
            layers[_module(name)] = _merged(entry, contents.layers)
            continue
        missing = [part.key for part in entry.parts if part.key not in contents.others]
        if missing:
            raise InputError(f"{missing[0]} is missing, for the original tensor {name}")
        others[name] = _assembled(name, entry, contents.others)
    dtype = next((t.dtype for t in others.values() if t.is_floating_point()), torch.float32)
    for name, shape in names.unused.items():
        if shape is not None:
            others[name] = torch.zeros(shape, dtype=dtype)
    return replace(contents, layers=layers, others=others, architecture=names.gguf or names.family)


def to_diffusers(contents: Contents, names: KeyMap, where: str) -> Contents:
    """The contents with the names of diffusers; inverse of :func:`to_original`.

    Args:
        contents: with original names, after :data:`PREFIX` or not.
        names: the map of its model.
        where: the file, for messages.

    Raises:
        CheckpointError: a tensor does not have the shape of the original one.
    """
    contents = without_prefix(contents)
    layers: dict[str, StoredLayer] = {}
    others: dict[str, Tensor] = {}
    known = set()
    for name, entry in names.entries.items():
        layer = contents.layers.get(_module(name)) if name.endswith(_WEIGHT) else None
        if layer is not None:
            known.add(_module(name))
            if layer.shape[0] != sum(part.rows for part in entry.parts):
                raise CheckpointError(f"{where}: {name} has {layer.shape[0]} rows, {_told(entry)}")
            layers |= _split(entry, layer)
        elif name in contents.others:
            known.add(name)
            tensor = contents.others[name]
            if tuple(tensor.shape) != entry.shape:
                raise CheckpointError(f"{where}: {name} is {list(tensor.shape)}, {_told(entry)}")
            others |= _taken_apart(entry, tensor)
    rest = {key: t for key, t in contents.others.items() if key not in known | names.unused.keys()}
    more = {key: layer for key, layer in contents.layers.items() if key not in known}
    return replace(contents, layers=layers | more, others=others | rest)


def with_names_of_diffusers(contents: Contents, model: nn.Module, where: str) -> Contents:
    """The contents of a file with original names or those of diffusers, under the latter.

    Args:
        contents: of the file.
        model: that it is of, without memory.
        where: the file, for messages.

    Raises:
        InputError: names are original ones, and diffusers' converter does not read such a model.
        CheckpointError: a tensor does not have the shape of the original one.
    """
    contents = without_prefix(contents)
    keys = {*contents.others, *(f"{name}{_WEIGHT}" for name in contents.layers)}
    names = names_of_file(keys, model)
    return contents if names is None else to_diffusers(contents, names, where)


def names_of_file(keys: Collection[str], model: nn.Module) -> KeyMap | None:
    """The map of the original names that a file has; None if it has those of diffusers.

    Args:
        keys: names of the tensors in the file, without :data:`PREFIX`.
        model: that it is of, not quantized.

    Raises:
        InputError: as :func:`with_names_of_diffusers`.
    """
    own = set(keys) & model.state_dict().keys()
    if len(own) == len(keys):
        return None
    names = key_map({**model.config, "_class_name": type(model).__name__})  # type: ignore[dict-item]
    if names is None or len(names.entries.keys() & set(keys)) <= len(own):
        return None
    return names


def without_prefix(contents: Contents) -> Contents:
    """The contents without :data:`PREFIX`."""
    return replace(
        contents,
        layers={key.removeprefix(PREFIX): layer for key, layer in contents.layers.items()},
        others={key.removeprefix(PREFIX): tensor for key, tensor in contents.others.items()},
    )


def _module(key: str) -> str:
    return key.removesuffix(_WEIGHT)


def _told(entry: Entry) -> str:
    keys = ", ".join(dict.fromkeys(part.key for part in entry.parts))
    return f"and the model needs {list(entry.shape)} for {keys}"


def _reason(name: str, modules: list[str], layers: Mapping[str, StoredLayer]) -> str | None:
    rows = ", ".join(anonymous(module) for module in modules)
    what = f"{anonymous(_module(name))} of original files has the rows of {rows}"
    if floats := [module for module in modules if module not in layers]:
        return f"{what}, and {anonymous(floats[0])} is float"
    first = layers[modules[0]]
    for other in (layers[module] for module in modules[1:]):
        if other.spec != first.spec or other.spatial != first.spatial:
            formats = ", ".join(layers[module].spec.weight_format for module in modules)
            return f"{what}, whose formats or transforms differ ({formats})"
        ours, theirs = _shared_by_rows(first), _shared_by_rows(other)
        for key, tensor in ours.items():
            if not torch.equal(_bits(tensor), _bits(theirs[key])):
                return f"{what}, and the format has one {key} for all rows, where they differ"
    return None


def _shared_by_rows(layer: StoredLayer) -> dict[str, Tensor]:
    """What all rows of a layer share, of the format and of the transform; each of it once."""
    shared = {key: t for key, t in layer.tensors.items() if not _by_row(layer, key)}
    for key in FORMATS[layer.spec.weight_format].matrix_tensors:
        shared.setdefault(key, layer.tensors[key][:1])  # stored for each row, all equal
    return shared


def _by_row(layer: StoredLayer, key: str) -> bool:
    tensor = layer.tensors[key]
    return key != "proj_down" and tensor.ndim > 0 and tensor.shape[0] == layer.shape[0]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor


def _concatenated(pieces: list[Tensor]) -> Tensor:
    """Rows of several tensors as one; torch cannot concatenate every float of 8 bits."""
    dtype = pieces[0].dtype
    return torch.cat([_bits(piece) for piece in pieces]).view(dtype)


def _merged(entry: Entry, layers: Mapping[str, StoredLayer]) -> StoredLayer:
    """The layer whose rows are those of several."""
    first = layers[_module(entry.parts[0].key)]
    tensors = {}
    for key, tensor in first.tensors.items():
        tensors[key] = tensor
        if _by_row(first, key):
            sources = [(p, layers[_module(p.key)].tensors[key]) for p in entry.parts]
            tensors[key] = _concatenated([t[p.start : p.start + p.rows] for p, t in sources])
    rows = sum(part.rows for part in entry.parts)
    return replace(first, shape=(rows, first.shape[1]), tensors=tensors)


def _split(entry: Entry, layer: StoredLayer) -> dict[str, StoredLayer]:
    """Inverse of :func:`_merged`; copies, as files refuse tensors that share memory."""
    if len(entry.parts) == 1:
        return {_module(entry.parts[0].key): layer}
    result = {}
    for key, places in _places(entry).items():
        tensors = {
            name: _concatenated([tensor[at : at + part.rows] for at, part in places])
            if _by_row(layer, name)
            else tensor.clone()
            for name, tensor in layer.tensors.items()
        }
        rows = sum(part.rows for _, part in places)
        result[_module(key)] = replace(layer, shape=(rows, layer.shape[1]), tensors=tensors)
    return result


def _assembled(name: str, entry: Entry, tensors: Mapping[str, Tensor]) -> Tensor:
    pieces = [tensors[part.key] for part in entry.parts]
    if len({piece.dtype for piece in pieces}) > 1:
        dtypes = ", ".join(f"{p.key} {t.dtype}" for p, t in zip(entry.parts, pieces, strict=True))
        raise InputError(f"{name} is one tensor in original files, and dtypes differ: {dtypes}")
    if len(pieces) == 1:
        return pieces[0].reshape(entry.shape)
    return torch.cat(
        [t[p.start : p.start + p.rows] for p, t in zip(entry.parts, pieces, strict=True)]
    )


def _taken_apart(entry: Entry, tensor: Tensor) -> dict[str, Tensor]:
    """Inverse of :func:`_assembled`."""
    if len(entry.parts) == 1:
        return {entry.parts[0].key: tensor.reshape(entry.diffusers_shape or entry.shape)}
    return {
        key: torch.cat([tensor[at : at + part.rows] for at, part in places])
        for key, places in _places(entry).items()
    }


def _places(entry: Entry) -> dict[str, list[tuple[int, Part]]]:
    """Parts of each diffusers tensor in the order of its rows, with their rows in the original."""
    found: dict[str, list[tuple[int, Part]]] = {}
    for at, part in _at(entry):
        found.setdefault(part.key, []).append((at, part))
    return {key: sorted(parts, key=lambda each: each[1].start) for key, parts in found.items()}


def _at(entry: Entry) -> Iterator[tuple[int, Part]]:
    at = 0
    for part in entry.parts:
        yield at, part
        at += part.rows
