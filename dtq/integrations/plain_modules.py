# SPDX-License-Identifier: Apache-2.0
"""Save and load quantized models that are plain ``nn.Module`` objects, of no library.

diffusers saves and builds its own models. A model that a user wrote has no ``save_pretrained`` and
no config to build it from: :func:`save` writes its tensors and the plan of its layers, and
:func:`load_into` puts them into a float model that the user has built, with or without memory
(``torch.device("meta")``). The tensors and their checksums are those of a diffusers folder.
"""

from __future__ import annotations

import json
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
from dtq.integrations.loaded_model import share_config_entries
from dtq.io.atomic import atomic_directory
from dtq.io.safe_parse import read_json
from dtq.nn.attention import use_int8_attention
from dtq.nn.linear import QuantLinear
from dtq.nn.shared_inputs import share_input_transforms
from dtq.nn.storage import aligned, from_disk
from dtq.nn.swap import finalize, swap_empty

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
    plan = config.load_plan()
    opened = reader.Reader(files)
    opened.check_plan(plan, model)
    floats = {k for k in opened.stored if k.rpartition(".")[0] not in plan.layers}
    if unknown := sorted(floats - set(model.state_dict())):
        raise CheckpointError(f"{folder}: the model has no tensor {unknown[0]}")
    swap_empty(model, plan, config.compute_dtype or torch.float32)
    state: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118  (safe_open is not a mapping)
                if key != reader.CHECKSUMS:
                    tensor = stored.get_tensor(key)
                    opened.check({key: tensor})
                    state[key] = aligned(_as_parameter(key, tensor, plan.layers))
    model.load_state_dict(state, assign=True)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise InputError(
            f"{left[0]} of {type(model).__name__} is in no file: build the model on a real device"
        )
    model.requires_grad_(False).eval()
    finalize(model, plan.edges, plan.policy)
    use_int8_attention(model, plan.int8_attention)
    share_input_transforms(model)
    attach_plain(model, config)
    return model


def attach_plain(model: nn.Module, config: DTQConfig) -> None:
    """Give a quantized plain module the attributes that :func:`save` and reports read."""
    share_config_entries(model, config)
    model.is_quantized = True  # type: ignore[assignment]
    model.hf_quantizer = DTQQuantizer(config, pre_quantized=True)  # type: ignore[assignment]


def _as_parameter(key: str, tensor: Tensor, layers: Any) -> Tensor:
    """Packed floats as the integers of their bits; other tensors as they are."""
    name, _, part = key.rpartition(".")
    return from_disk(tensor) if name in layers and part != "bias" else tensor


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
