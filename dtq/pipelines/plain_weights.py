# SPDX-License-Identifier: Apache-2.0
"""Whether stored tensors are the weights of a model, and how they become that.

Other tools store codes and a scale next to them, wrap names in prefixes, or leave tensors out.
diffusers reads the codes as weights, ignores what it does not know, and makes up what is missing.
dtq applies the scale of FP8 weights, removes known prefixes, and refuses everything else by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.model_loading_utils import load_model_dict_into_meta
from safetensors.torch import load_file
from torch import Tensor, nn

from dtq.errors import CheckpointError
from dtq.io.default_dtype import default_dtype
from dtq.pipelines.stored_tensors import (
    COMPANION,
    FLOATS,
    FP8,
    SCALE_WORD,
    Stored,
    not_plain,
    read_tensor,
    refuse_saturated,
)

log = logging.getLogger("dtq")

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PREFIXES = ("module.", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.")

_SCALES = (".weight_scale", ".scale_weight")
_UNUSED = (".input_scale", ".scale_input")  # scales of activations, which dtq chooses itself
_MARKER = "scaled_fp8"  # an empty tensor in files of ComfyUI

_INDEX = re.compile(r"\.\d+(?=\.)")


@dataclass
class PlainWeights:
    """How the tensors of some files become the weights of a model.

    Attributes:
        names: name in the files to name in the model, where they differ.
        scales: name of an FP8 weight in the files to that of its scale.
        stored: what the headers say.
    """

    names: dict[str, str] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return sorted({tensor.file for tensor in self.stored.values()})

    @property
    def as_stored(self) -> bool:
        """Whether diffusers reads the files as they are."""
        return not self.names and not self.scales

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file by their names in the model, with scales applied."""
        converted = {}
        for key, tensor in tensors.items():
            value = tensor
            if (scale := self.scales.get(key)) is not None:
                factor = read_tensor(self.stored, scale).float()
                value = tensor.float() * factor.reshape(-1, *[1] * (tensor.ndim - 1))
            converted[self.names.get(key, key)] = value
        return converted


def plain_weights(
    model: nn.Module,
    stored: dict[str, Stored],
    read: Callable[[str], Tensor] | None = None,
) -> PlainWeights:
    """How stored tensors become the weights of a float model.

    Args:
        model: on any device.
        stored: name to file, dtype and shape.
        read: gives a tensor by its name; default: from its file.

    Raises:
        CheckpointError: a tensor is missing or has another shape, is in a code that dtq does not
            decode, or belongs to a layer of the model and is none of its parameters; names it.
    """
    names = _names_in_model(model, stored)
    plain = PlainWeights(stored=stored)
    by_name = {names[key]: key for key in stored}
    expected: dict[str, Tensor] = model.state_dict()
    extra = {name: key for name, key in by_name.items() if name not in expected}
    plain.scales = _fp8_scales(extra, by_name, stored)
    used = {*plain.scales.values(), *(k for n, k in extra.items() if plain.scales and _unused(n))}
    used |= _ignored(model, extra)
    unknown = {name: key for name, key in extra.items() if key not in used}
    _refuse_companions(unknown, {*expected}, stored)
    _check_expected(model, by_name, stored)
    refuse_saturated({k: t for k, t in stored.items() if k not in plain.scales}, read)
    renamed = {k: n for k, n in names.items() if n != k and n in expected}
    plain.names = {k: n for k, n in renamed.items() if n == _unwrapped(k, expected)}
    if plain.names:
        key, name = next(iter(plain.names.items()))
        log.warning(
            "%s: %d tensors have a prefix, which is removed (%s is %s)",
            stored[key].file, len(plain.names), key, name,
        )  # fmt: skip
    if plain.scales:
        file = plain.files[0]
        log.warning("%s: the scales of %d FP8 weights are applied", file, len(plain.scales))
    return plain


def load_converted(kind: Any, folder: Path, weights: PlainWeights, dtype: torch.dtype) -> Any:
    """The model that ``from_pretrained`` would load from the converted files.

    Args:
        kind: the diffusers class.
        folder: with ``config.json``.
        weights: its files, and how to convert them.
        dtype: of the model.
    """
    with default_dtype(dtype), init_empty_weights():
        model = kind.from_config(kind.load_config(folder))
    for file in weights.files:
        load_model_dict_into_meta(
            model,
            weights.convert(load_file(file)),
            dtype=dtype,
            device_map={"": torch.device("cpu")},
            keep_in_fp32_modules=kind._keep_in_fp32_modules or [],
        )
    model.register_to_config(_name_or_path=str(folder))
    return model.eval()


def _names_in_model(model: nn.Module, stored: Mapping[str, Stored]) -> dict[str, str]:
    """Name in the files to name in the model, or without its prefix if the model has no such.

    Raises:
        CheckpointError: two tensors have the same name in the model.
    """
    expected = {*model.state_dict()}
    deprecated = {key: key for key in stored}
    model._fix_state_dict_keys_on_load(deprecated)  # type: ignore[operator]  # of old autoencoders
    names = {key: name for name, key in deprecated.items()}
    for key, name in names.items():
        if name not in expected:
            names[key] = _unwrapped(name, expected)
    keys: dict[str, str] = {}
    for key, name in names.items():
        if name in keys and name in expected:
            raise CheckpointError(
                f"{stored[key].file}: {keys[name]} and {key} are both {name} of the model; remove "
                f"one of them"
            )
        keys[name] = key
    return names


def without_wrappers(name: str) -> str:
    """A name without the wrappers of torch: ``torch.compile``, FSDP, activation checkpoints."""
    return _WRAPPERS.sub("", name)


def _unwrapped(name: str, expected: Iterable[str]) -> str:
    """A name without wrappers and without prefixes of whole models, if it is expected then."""
    short = without_wrappers(name)
    while short not in expected:
        rest = next((short.removeprefix(p) for p in _PREFIXES if short.startswith(p)), short)
        if rest == short:
            break
        short = rest
    return short


def _fp8_scales(
    extra: Mapping[str, str], by_name: Mapping[str, str], stored: Mapping[str, Stored]
) -> dict[str, str]:
    """FP8 weights and their scales, if a scale per tensor or per row is all that was added."""
    scales = {}
    for name, key in extra.items():
        ending = next((e for e in _SCALES if name.endswith(e)), None)
        if ending is None:
            continue
        weight = by_name.get(f"{name.removesuffix(ending)}.weight")
        if weight is None or stored[weight].dtype not in FP8 or weight in scales:
            return {}
        rows = stored[weight].shape[:1]
        scale = stored[key]
        if scale.dtype not in FLOATS or scale.shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
            return {}
        scales[weight] = key
    return scales


def _unused(name: str) -> bool:
    return name == _MARKER or name.endswith(_UNUSED)


def _ignored(model: nn.Module, extra: Mapping[str, str]) -> set[str]:
    """Keys of buffers that the model computes, and of tensors that its class ignores."""
    buffers = {name for name, _ in model.named_buffers()}
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {
        key
        for name, key in extra.items()
        if not buffers.isdisjoint((name, key)) or any(re.search(p, key) for p in patterns)
    }


def _refuse_companions(
    extra: Mapping[str, str], expected: set[str], stored: Mapping[str, Stored]
) -> None:
    """Refuse tensors that change what a weight means; warn of others that the model has not.

    Args:
        extra: name without prefix to name in the files.
        expected: names of the model.
        stored: of the files.

    Raises:
        CheckpointError: names the tensor.
    """
    blocks = {_INDEX.sub(".*", name) for name in expected}
    for name, key in extra.items():
        if _INDEX.sub(".*", name) in blocks:
            layers = [f"{name[: index.end()]}." for index in _INDEX.finditer(name)]
            exist = all(any(other.startswith(layer) for other in expected) for layer in layers)
            raise CheckpointError(
                f"{stored[key].file}: holds {key}, which this layer of the model of config.json "
                f"does not have; one of the two is from another model"
                if exist
                else f"{stored[key].file}: holds {key}, and config.json describes a model of fewer "
                f"layers; one of the two is from another model"
            )
        parts = name.split(".")
        owners = (".".join(parts[:n]) for n in range(1, len(parts)))
        owner = next((o for o in owners if o in expected or f"{o}.weight" in expected), None)
        known = any(name.startswith(f"{other}_") for other in expected)
        if COMPANION.search(name) or SCALE_WORD.search(name) or known or owner is not None:
            raise not_plain(stored[key].file, f"the tensor {key}")
    if extra:
        shown = ", ".join(sorted(extra.values())[:3])
        file = stored[next(iter(extra.values()))].file
        log.warning("%s: %d tensors are not of the model: %s", file, len(extra), shown)


def _check_expected(
    model: nn.Module, by_name: Mapping[str, str], stored: Mapping[str, Stored]
) -> None:
    """Check that every parameter is stored, as floats and in its shape.

    Raises:
        CheckpointError: names the tensor.
    """
    files = ", ".join(sorted({str(tensor.file) for tensor in stored.values()}))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(name for name in parameters if name not in by_name)
    for name, tensor in model.state_dict().items():
        if name not in by_name:
            continue
        key = by_name[name]
        file, dtype, shape = stored[key]
        if tensor.is_floating_point() and dtype not in FLOATS | {*FP8}:
            raise not_plain(file, f"the tensor {key}, which is {dtype},")
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{file}: {key} has shape {list(shape)}, the model of config.json needs "
                f"{list(tensor.shape)}"
            )
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        if like := [key for key in stored if key.endswith(f".{missing[0]}")]:
            others += f"; it has {like[0]}"
        raise CheckpointError(
            f"{files or 'the files'}: the tensor {missing[0]} is missing{others}; the file is "
            f"incomplete, or from another version of the model"
        )
