# SPDX-License-Identifier: Apache-2.0
"""Save and load quantized models that are plain ``nn.Module`` objects, of no library.

diffusers saves and builds its own models. A model that a user wrote has no ``save_pretrained`` and
no config to build it from: :func:`save` writes its tensors and the plan of its layers, and
:func:`load_into` puts them into a float model that the user has built, with or without memory
(``torch.device("meta")``). The tensors and their checksums are those of a diffusers folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from dtq.checkpoint import reader, writer
from dtq.checkpoint.config import DTQConfig, is_dtq
from dtq.errors import CheckpointError, InputError
from dtq.integrations.diffusers import DTQQuantizer
from dtq.integrations.loaded_model import (
    build_layers,
    checked_tensors,
    finish_loading,
    set_packed_tensor,
)
from dtq.io.atomic import atomic_directory
from dtq.io.safe_parse import read_json
from dtq.nn.linear import QuantLinear
from dtq.nn.weight_only import WeightOnly

PATTERN = "model{suffix}.safetensors"
"""Names of the weight files."""


def save(model: Any, folder: str | Path, *, overwrite: bool = False, shard: str = "10GB") -> Path:
    """Save a quantized model or pipeline; the folder appears whole or not at all.

    Models and pipelines of diffusers are written as their ``save_pretrained`` does.

    Args:
        model: quantized by :func:`dtq.quantize`.
        folder: to make.
        overwrite: replace a folder that is not empty.
        shard: largest safetensors file, such as ``500MB``.

    Returns:
        The folder.

    Raises:
        InputError: the model is not quantized, or the folder is not empty.
    """
    if hasattr(model, "save_pretrained"):
        return writer.write(model, folder, overwrite=overwrite, shard=shard)
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, DTQQuantizer):
        raise InputError(
            f"{type(model).__name__} is not quantized: dtq.quantize(model, inputs=[...]) first; a "
            f"float model is saved with torch or safetensors"
        )
    # a cast of a model of diffusers changes its config; that of another module cannot
    for layer in (m for m in model.modules() if isinstance(m, QuantLinear)):
        quantizer.quantization_config.compute_dtype = layer.compute_dtype
    tensors, _ = quantizer.get_state_dict_and_metadata(model.state_dict(), True)
    config = {
        "_class_name": type(model).__name__,
        "quantization_config": quantizer.quantization_config.to_dict(),
    }
    with atomic_directory(Path(folder), overwrite=overwrite) as side:
        save_torch_state_dict(tensors, side, filename_pattern=PATTERN, max_shard_size=shard)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (side / "config.json").write_text(text, encoding="utf-8")
    return Path(folder)


def load_into(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load what :func:`save` wrote into a float model of the same class.

    Args:
        model: built as before quantization, on any device; on the meta device it takes no memory
            until its tensors are loaded. Changed in place.
        folder: of :func:`save`.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: the folder is not one of :func:`save`; the model is quantized already.
        CheckpointError: a file is damaged, or does not fit the model; names the tensor.
    """
    folder = Path(folder)
    config, files = _read(folder)
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise InputError(f"{type(model).__name__} is quantized already; build the float model")
    opened = reader.Reader(files)
    known = {n: t.device for n, t in model.state_dict().items()}
    build_layers(model, config, opened)
    unknown = {k for k in opened.stored if k not in known and _layer_of(k) not in config.layers}
    if unknown:
        raise CheckpointError(f"{folder}: the model has no tensor {min(unknown)}")
    for file in files:
        with safe_open(file, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            _set(model, checked_tensors(tensors, opened), known)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise InputError(
            f"{left[0]} of {type(model).__name__} is in no file: build the model on a real device"
        )
    model.requires_grad_(False).eval()
    finish_loading(model, config)
    model.is_quantized = True  # type: ignore[assignment]
    model.hf_quantizer = DTQQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    return model


def _set(model: nn.Module, tensors: dict[str, Tensor], devices: Mapping[str, torch.device]) -> None:
    """Put checked tensors into a model.

    Args:
        model: with quantized layers that have no values yet.
        tensors: as in the files.
        devices: of the float model by name; its tensors on the meta device go to the CPU.
    """
    floats = {}
    for key, tensor in tensors.items():
        layer, part = _layer_of(key), key.rpartition(".")[2]
        module = model.get_submodule(layer)
        device = devices[key if key in devices else f"{layer}.weight"]
        place = torch.device("cpu") if device.type == "meta" else device
        if isinstance(module, QuantLinear | WeightOnly) and part in module.tensor_specs():
            set_packed_tensor(module, part, key, tensor, place)
        else:
            floats[key] = tensor.to(place)
    # not strict: the other tensors come from other files, and build_layers has checked that none is
    # missing
    model.load_state_dict(floats, strict=False, assign=True)


def _layer_of(key: str) -> str:
    return key.rpartition(".")[0]


def _read(folder: Path) -> tuple[DTQConfig, list[Path]]:
    """The config and the weight files of a folder.

    Raises:
        InputError: it is no folder of :func:`save`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; expected a folder that dtq.save wrote")
    fields: Any = read_json(path).get("quantization_config")
    if not is_dtq(fields):
        raise InputError(f"{path}: not quantized by dtq (no quantization_config)")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no weights; expected {PATTERN.format(suffix='')}")
    return DTQConfig(**fields), files
