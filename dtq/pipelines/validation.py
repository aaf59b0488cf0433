# SPDX-License-Identifier: Apache-2.0
"""Check a model folder before any library reads it.

A folder may come from anywhere. diffusers and transformers import the classes that its index names,
follow its links and build the models of its configs. dtq restricts that before they do: only
safetensors, only files inside the folder, only classes of these libraries, and only models as large
as their files.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import pipelines
from diffusers.utils import is_transformers_available
from torch import nn
from torch.nn.modules import module as hooks

from dtq.errors import LIBRARY_ERRORS, CheckpointError, InputError, first_line
from dtq.io.safe_parse import read_json
from dtq.pipelines.plain_weights import PlainWeights, plain_weights
from dtq.pipelines.stored_tensors import FLOATS, FP8, read_headers, refuse_codes
from dtq.pipelines.weight_files import resolve_variants, tensor_names, weight_files

SPARE_BYTES = 2**30
"""Bytes that buffers of a model (position tables, rotary embeddings) may need, whatever the size of
the weights."""

MAX_TRAIN_STEPS = 10**6
"""Largest ``num_train_timesteps`` of a scheduler, which has tables of that length; usual: 1000."""

_NAME = re.compile(r"[A-Za-z_]\w*")
_MODULES_PER_TENSOR = 16  # a block has more modules than tensors, but not by that much
_LIBRARIES = ("diffusers", "transformers")


def check_folder(
    path: Path, variant: str | None = None, *, warn: bool = False
) -> tuple[dict[str, str | None], dict[str, PlainWeights]]:
    """Check a pipeline or model folder; models are only built on the meta device.

    Errors name the file, the key and a way out.

    Args:
        path: the folder.
        variant: what the user asks for.
        warn: as for :func:`resolve_variants`.

    Returns:
        Component to the variant of its files, and the components whose weights diffusers cannot
        read as they are stored; "" is a bare model.

    Raises:
        InputError: a link leads out of the folder, weights are stored only as pickle, an index
            names files elsewhere or code to import, or the variant is not clear.
        CheckpointError: a safetensors file is damaged, or its tensors are not the weights of the
            model.
    """
    folders, index = model_folders(path), path / "model_index.json"
    variants = resolve_variants(path, folders, variant, warn=warn)
    kinds: Mapping[str, object] = (
        {name: kind for name, (_, kind) in components(index).items()}
        if index.is_file()
        else {"": read_json(path / "config.json").get("_class_name")}
    )
    checked = {
        name: _check_component(folder, kinds[name], variants[name])
        for name, folder in folders.items()
    }
    return variants, {n: plain for n, plain in checked.items() if plain and not plain.as_stored}


def model_folders(path: Path) -> dict[str, Path]:
    """The components of a pipeline that have a folder, or "" for a bare model; checks links.

    Raises:
        InputError: as :func:`check_links` and :func:`components`.
    """
    check_links(path)
    index = path / "model_index.json"
    if not index.is_file():
        return {"": path}
    return {name: path / name for name in components(index) if (path / name).is_dir()}


def components(index: Path) -> dict[str, tuple[str, str]]:
    """Read the components of a pipeline from its ``model_index.json``.

    Returns:
        Component to library and class; components that are null are left out.

    Raises:
        InputError: a name is not an identifier, or a library would be imported that is not allowed.
    """
    result = {}
    data = read_json(index)
    if not isinstance(data.get("_class_name"), str):
        raise InputError(
            f"{index}: '_class_name' must be the name of a pipeline of diffusers; pipelines that "
            f"come as code are not loaded. Load it yourself and pass the object to dtq.quantize"
        )
    for name, entry in data.items():
        if not isinstance(entry, list) or name.startswith("_"):
            continue
        if not _NAME.fullmatch(name):
            raise InputError(f"{index}: {name!r} is not the name of a component")
        if len(entry) != 2 or not all(x is None or isinstance(x, str) for x in entry):
            raise InputError(f"{index}: {name!r} must be [library, class], is {entry!r}"[:300])
        if None not in entry:
            result[name] = (entry[0], entry[1])
            _check_class(index, name, *result[name])
    return result


def check_links(path: Path) -> None:
    """Refuse symbolic links that lead out of the folder, or out of the model's hub cache.

    Raises:
        InputError: a link leads out, or nowhere; names it.
    """
    home = path.resolve()
    for parent in home.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            home = parent.parent
    for folder, below, files in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in (*below, *files):
            file = Path(folder, name)
            try:
                outside = file.is_symlink() and not file.resolve().is_relative_to(home)
            except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
                raise InputError(f"{file}: a link that leads nowhere") from error
            if outside:
                raise InputError(
                    f"{file}: a link out of the folder, to {os.readlink(file)}. Copy what it "
                    f"points to into the folder"
                )


def meta_model(folder: Path, kind: Any, files: Sequence[Path]) -> nn.Module:
    """Build a model on the meta device from its config, limited to the size of its files.

    Args:
        folder: of the model.
        kind: the class of diffusers or transformers.
        files: its weights; without them only a fixed limit applies.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: the config does not fit the class.
        CheckpointError: the config describes a larger model than the files hold.
    """
    config = folder / "config.json"
    stored = sum(file.stat().st_size for file in files)
    tensors = sum(len(tensor_names(file)) for file in files)
    try:
        with torch.device("meta"), limit_modules(config, tensors):
            if hasattr(kind, "from_config"):
                model: nn.Module = kind.from_config(read_json(config))
            else:  # a class of transformers
                fields = read_json(config)
                fields.pop("quantization_config", None)
                model = kind(kind.config_class.from_dict(fields))
    except LIBRARY_ERRORS as error:
        raise InputError(
            f"{config}: {kind.__name__} cannot be built from it ({first_line(error)})"
        ) from error
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    if buffers > 2 * stored + SPARE_BYTES:
        raise CheckpointError(
            f"{config}: describes tables of {buffers} bytes, the weights have {stored}; a size in "
            f"it is damaged"
        )
    return model.eval()


@contextmanager
def limit_modules(config: Path | str, tensors: int) -> Iterator[None]:
    """Stop the construction of a model with far more modules than its files have tensors.

    Args:
        config: for the message.
        tensors: number of tensors in the files; 0 for a config alone.

    Raises:
        CheckpointError: the limit is exceeded.
    """
    limit, modules = _MODULES_PER_TENSOR * tensors + 1000 if tensors else 200_000, 0

    def count(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > limit:
            raise CheckpointError(
                f"{config}: describes a model of more than {limit} modules, the files hold "
                f"{tensors} tensors; a number of layers in the config is damaged"
            )

    with hooks.register_module_module_registration_hook(count):
        yield


def check_shapes(
    config: str, model: nn.Module, stored: Mapping[str, tuple[str, tuple[int, ...]]],
    planned: Mapping[str, object],
) -> None:  # fmt: skip
    """Check that the files hold every unquantized tensor of the model, in its shape and as floats.

    Args:
        config: name of the config file, for messages.
        model: the float model, on any device.
        stored: tensor name in the files to dtype, as safetensors writes it, and shape.
        planned: names of the quantized linears, whose packed tensors are checked elsewhere.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is packed without an entry in
            ``planned``.
    """
    # transformers stores a tensor that two modules share once
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key, tensor in model.state_dict().items():
        name, _, tensor_name = key.rpartition(".")
        if key in tied or (name in planned and tensor_name == "weight"):
            continue
        if key not in stored:
            raise CheckpointError(
                f"{config}: the tensor {key} of the model is missing in the files"
            )
        dtype, shape = stored[key]
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{key} has shape {list(shape)} in the file, {config} needs {list(tensor.shape)}"
            )
        if tensor.is_floating_point() and dtype not in FLOATS | {*FP8}:
            raise CheckpointError(
                f"{key} is {dtype} in the file, and {config} has no entry in 'layers' that names "
                f"its format"
            )


def _check_component(folder: Path, name: object, variant: str | None) -> PlainWeights | None:
    """Check the files, the scheduler config and the weights of a component of class ``name``."""
    files = weight_files(folder, variant)
    scheduler = folder / "scheduler_config.json"
    if scheduler.is_file():
        steps = read_json(scheduler).get("num_train_timesteps", 1)
        if not isinstance(steps, int) or not 0 < steps <= MAX_TRAIN_STEPS:
            raise InputError(
                f"{scheduler}: 'num_train_timesteps' must be 1 to {MAX_TRAIN_STEPS}, is {steps!r}"
            )
    if not (folder / "config.json").is_file():
        return None
    kind, model = model_kind(name), None
    try:
        if kind is not None:
            model = meta_model(folder, kind, files)
    except InputError as error:
        if not _needs_real_weights(error.__cause__):
            raise
    return check_weights(folder, model, files)


def check_weights(folder: Path, model: nn.Module | None, files: list[Path]) -> PlainWeights | None:
    """Check that the files of a float model hold its weights.

    A quantized model is left to the library that its ``config.json`` names.

    Args:
        folder: with ``config.json``.
        model: on any device; None if it is of another library than diffusers.
        files: the safetensors files that are read.

    Raises:
        CheckpointError: there are none, or they hold something else; names the tensor.
    """
    if model is not None and not files:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name != "config.json")
        raise CheckpointError(
            f"{folder}: no weights; expected diffusion_pytorch_model.safetensors or its index, "
            f"the folder has {', '.join(names[:5]) or 'only config.json'}"
        )
    if read_json(folder / "config.json").get("quantization_config") is not None:
        return None
    if model is None:
        refuse_codes(read_headers(files))
        return None
    return plain_weights(model, read_headers(files))


def _needs_real_weights(cause: BaseException | None) -> bool:
    """Whether a class cannot be built on the meta device because it reads its weights meanwhile.

    diffusers can build it on a real device. Torch has no error class for that.
    """
    words = "meta tensor", "meta device"
    return isinstance(cause, RuntimeError | TypeError) and any(w in str(cause) for w in words)


def model_kind(name: object) -> Callable[..., Any] | None:
    """The diffusers model class of a name; None if there is none."""
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not inspect.isclass(kind) or not issubclass(kind, diffusers.ModelMixin):
        return None
    return kind


def text_kind(name: object) -> Any:
    """The model class of transformers of a name; None if there is none."""
    if not isinstance(name, str) or not name.isidentifier() or not is_transformers_available():
        return None
    import transformers

    kind = getattr(transformers, name, None)
    if not inspect.isclass(kind) or not issubclass(kind, transformers.PreTrainedModel):
        return None
    return kind


def _check_class(index: Path, name: str, library: str, kind: str) -> None:
    """Refuse libraries that are neither known nor imported already: an import runs their code."""
    if not kind.isidentifier():
        raise InputError(f"{index}: {name!r}: {kind!r} is not the name of a class")
    if library in _LIBRARIES or hasattr(pipelines, library):
        return
    imported = getattr(sys.modules.get(library), kind, None)
    if not hasattr(imported, "from_pretrained"):
        raise InputError(
            f"{index}: {name!r} is of the library {library!r}, whose code would be imported; dtq "
            f"imports only {' and '.join(_LIBRARIES)}. Import it yourself first if you trust it"
        )
