# SPDX-License-Identifier: Apache-2.0
"""``dtq.load``: a file of another engine as a quantized model of dtq.

The layers run with dtq's kernels, and the model is like one of ``from_pretrained``: it can be
saved, exported, evaluated, or dequantized as the source of another quantization.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from dtq.checkpoint.config import DTQConfig
from dtq.engines import TARGETS
from dtq.engines.original import with_names_of_diffusers
from dtq.engines.target import OF_THE_CHECKPOINT, Contents, StoredLayer, Target, stored_bytes
from dtq.errors import LIBRARY_ERRORS, CheckpointError, InputError, first_line
from dtq.integrations.diffusers import attach_quantizer
from dtq.io.safe_parse import read_json
from dtq.models.linears import is_linear, shape_of
from dtq.nn.linear import QuantLinear
from dtq.nn.storage import check_tensor
from dtq.nn.swap import finalize
from dtq.pipelines.loading import translate_errors
from dtq.pipelines.stored_tensors import SAFETENSORS_DTYPES
from dtq.pipelines.validation import (
    SPARE_BYTES,
    check_folder,
    check_shapes,
    limit_modules,
    model_kind,
)
from dtq.plan.layers import COMPUTE_DTYPES, LayerPlan, Plan

ConfigSource = str | Path | Mapping[str, Any] | None
"""A diffusers config, its file or folder, or the folder of a pipeline; None: that of the file."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}


def load(file: str | Path, config: ConfigSource = None) -> Any:
    """Load a file of another engine.

    The tensors have the names of the model's original files, or those of diffusers.

    Args:
        file: a file or folder in one of the formats of ``dtq export --list``.
        config: diffusers config of the model: a mapping, a ``config.json``, its folder, or the
            folder of a pipeline with a ``transformer``. None: the one in the file, which dtq
            writes.

    Returns:
        The quantized diffusers model, in evaluation mode.

    Raises:
        InputError: no engine writes such files; there is no config, or it names no model.
        CheckpointError: the file is damaged, or does not fit the config; names the tensor.
    """
    file = Path(file)
    return filled(*read_checked(file, config), file.stem)


def read_checked(file: Path, config: ConfigSource = None) -> tuple[nn.Module, Contents]:
    """Read a file, and check every tensor of it against its model.

    Args:
        file: as for :func:`load`.
        config: as for :func:`load`.

    Returns:
        The model without memory, and the contents under the names of diffusers.

    Raises:
        InputError: as :func:`load`.
        CheckpointError: as :func:`load`.
    """
    read = recognize(file).read
    assert read is not None  # recognize gives no other
    contents = read(file)
    if contents.compute_dtype not in ("", *DTYPES):
        raise CheckpointError(f"{file}: dtq.compute_dtype is {contents.compute_dtype!r}")
    fields, where = _config(contents, config, file)
    model = _empty_model(fields, where, contents, file)
    contents = with_names_of_diffusers(contents, model, str(file))
    _check(model, contents, where, file)
    return model, contents


def load_float(file: str | Path, config: ConfigSource = None) -> Any:
    """Load a file of another engine as a float model, the source of another quantization.

    Args:
        file: as for :func:`load`.
        config: as for :func:`load`. With the folder of a pipeline, the result is that pipeline,
            whose prompts and sampler calibrate the next quantization.

    Returns:
        The float diffusers model, or a pipeline with it.

    Raises:
        InputError: as :func:`load`.
        CheckpointError: as :func:`load`.
    """
    model = load(file, config)
    model = model.dequantize()
    folder = Path(config) if isinstance(config, str | Path) else None
    if folder is None or not (folder / "model_index.json").is_file():
        return model
    check_folder(folder)
    with translate_errors(folder):
        return DiffusionPipeline.from_pretrained(
            folder, transformer=model, torch_dtype=model.dtype, use_safetensors=True
        )


def recognize(file: Path, *, readable: bool = True) -> Target:
    """The target that a file is of.

    Args:
        file: a file or a folder.
        readable: whether dtq must be able to read it; it does not read graphs.

    Raises:
        InputError: there is no such file, or it is of no target.
    """
    if not file.exists():
        raise InputError(f"{file}: no such file")
    targets = {name: target for name, target in TARGETS.items() if target.read or not readable}
    for target in targets.values():
        if file.is_dir() == (not target.suffix) and target.recognizes(file):
            return target
    raise InputError(
        f"{file} is in none of the formats that dtq knows ({', '.join(targets)}); a folder of dtq "
        f"or diffusers is loaded with from_pretrained"
    )


def _config(contents: Contents, config: ConfigSource, file: Path) -> tuple[dict[str, Any], str]:
    """The config, and where it is from."""
    if isinstance(config, Mapping):
        return _of_the_model(config), "config"
    if config is None:
        if not contents.config:
            raise InputError(
                f"{file} has no config of its model; give config=FOLDER (--config FOLDER) with the "
                f"config.json of the diffusers model"
            )
        return contents.config, f"{file}: config"
    path = Path(config)
    if path.is_dir():
        path = path / "transformer" if (path / "model_index.json").is_file() else path
        path = path / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; config= names a config.json or its folder")
    return _of_the_model(read_json(path)), str(path)


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in OF_THE_CHECKPOINT}


def _empty_model(fields: dict[str, Any], where: str, contents: Contents, file: Path) -> nn.Module:
    """The float model with parameters on the meta device, no larger than its file."""
    kind: Any = model_kind(fields.get("_class_name"))
    if kind is None:
        raise InputError(f"{where}: diffusers has no model {fields.get('_class_name')!r}")
    count = len(contents.others) + 3 * len(contents.layers)
    try:
        with torch.device("meta"), limit_modules(where, count):
            size = sum(b.numel() * b.element_size() for b in kind.from_config(fields).buffers())
        if size > 2 * stored_bytes(file) + SPARE_BYTES:
            raise CheckpointError(f"{where}: describes tables of {size} bytes; it is damaged")
        with init_empty_weights(include_buffers=False):
            model: nn.Module = kind.from_config(fields)
    except LIBRARY_ERRORS as error:
        raise InputError(
            f"{where}: {kind.__name__} cannot be built from it ({first_line(error)})"
        ) from error
    return model.eval()


def _check(model: nn.Module, contents: Contents, where: str, file: Path) -> None:
    """Check that the file holds every tensor of the model and no other.

    Raises:
        CheckpointError: it does not; names the tensor.
    """
    stored = {
        key: (SAFETENSORS_DTYPES.get(t.dtype, "?"), tuple(t.shape))
        for key, t in contents.others.items()
    }
    modules = dict(model.named_modules())
    for name, layer in contents.layers.items():
        module = modules.get(name)
        if module is None or not is_linear(module) or hasattr(module, "kernel_size"):
            raise CheckpointError(
                f"{file}: the model of {where} has no linear {name!r}; dtq reads files with the "
                f"names of diffusers or of the model's original files"
            )
        if shape_of(module) != layer.shape:
            raise CheckpointError(
                f"{file}: {name} is {list(layer.shape)}, {where} needs {list(shape_of(module))}"
            )
        _check_layer(f"{file}: {name}", layer)
    check_shapes(where, model, stored, contents.layers)
    for name in contents.layers:
        wants, has = modules[name].bias is not None, f"{name}.bias" in contents.others
        if wants != has:
            raise CheckpointError(f"{file}: {name}.bias is {'missing' if wants else 'too much'}")
    unknown = set(contents.others) - set(model.state_dict())
    if unknown:
        first = sorted(unknown)[0]
        raise CheckpointError(
            f"{file}: {len(unknown)} tensors are not of the model, {first} is one; a file must "
            f"have the names of diffusers or of the model's original files"
        )


def _check_layer(where: str, layer: StoredLayer) -> None:
    try:
        specs = layer.spec.validated_for(layer.shape)
    except InputError as error:
        raise CheckpointError(f"{where}: {error}") from error
    for key, spec in specs.items():
        if key not in layer.tensors:
            raise CheckpointError(f"{where}: {key} is missing")
        check_tensor(f"{where}: {key}", layer.tensors[key], spec)
        wrong = spec.unsupported_reason and spec.unsupported_reason(layer.tensors[key])
        if wrong:
            raise CheckpointError(f"{where}: {key} holds {wrong}")


def filled(model: nn.Module, contents: Contents, name: str) -> nn.Module:
    """The model with dtq's quantized layers and every tensor of a file.

    Args:
        model: of :func:`read_checked`; it is changed.
        contents: of :func:`read_checked`.
        name: of the recipe, if the file does not say.

    Returns:
        The same model, quantized.
    """
    dtype = _compute_dtype(contents)
    plans = []
    for key, layer in contents.layers.items():
        old = model.get_submodule(key)
        new = QuantLinear.in_place_of(old, layer.spec, compute_dtype=dtype, device="meta")
        new.fill(layer.tensors)
        model.set_submodule(key, new)
        plans.append(LayerPlan(key, "other", layer.shape, layer.spec))
    state = {key: t.contiguous() for key, t in contents.others.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.requires_grad_(False)
    finalize(model, ())
    plan = Plan(contents.recipe or name, tuple(plans))
    attach_quantizer(model, plan, (), dtype, DTQConfig())
    return model


def _compute_dtype(contents: Contents) -> torch.dtype:
    """The one in the file, or the float dtype of most tensors."""
    if contents.compute_dtype:
        return DTYPES[contents.compute_dtype]
    counts = Counter(t.dtype for t in contents.others.values() if t.dtype in COMPUTE_DTYPES)
    return counts.most_common(1)[0][0] if counts else torch.float32
