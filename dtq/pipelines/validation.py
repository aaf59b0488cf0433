# SPDX-License-Identifier: Apache-2.0
"""What a model folder may hold, checked before any library reads it.

A folder comes from anywhere. diffusers and transformers import what its index names, follow its
links and build what its configs ask for; here that is bounded first: only safetensors, only files
inside the folder, only classes of those libraries, only models as large as their files.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import pipelines
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules import module as hooks

from dtq.errors import LIBRARY_ERRORS, CheckpointError, InputError, first_line
from dtq.io.safe_parse import read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Files that run code when they are opened, or may."""

SPARE_BYTES = 2**30
"""What the tables that a config asks for (positions, rotations) may take beside the weights."""

MOST_TRAIN_STEPS = 10**6
"""Of a scheduler, which makes tables that long; real ones have 1000."""

_NAME = re.compile(r"[A-Za-z_]\w*")
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
_MODULES_PER_TENSOR = 16  # a block has more modules than tensors, but not by that much
_LIBRARIES = ("diffusers", "transformers")


def check_folder(path: Path) -> None:
    """Refuse a pipeline or model folder that is not what it should be; nothing is built.

    Raises:
        InputError: links that lead out of the folder, weights that are only there as pickle, an
            index that names files elsewhere or code to import.
        CheckpointError: a safetensors file is damaged. Both name the file, the key and a way out.
    """
    check_links(path)
    index = path / "model_index.json"
    if not index.is_file():
        _check_part(path, read_json(path / "config.json").get("_class_name"))
        return
    for name, (_, kind) in components(index).items():
        if (path / name).is_dir():
            _check_part(path / name, kind)


def components(index: Path) -> dict[str, tuple[str, str]]:
    """Component to library and class, from a ``model_index.json``; absent parts are left out.

    Raises:
        InputError: a name that is not one, or a library whose code would be imported.
    """
    found = {}
    data = read_json(index)
    if not isinstance(data.get("_class_name"), str):
        raise InputError(
            f"{index}: '_class_name' must be the name of a pipeline of diffusers; pipelines that "
            f"come as code are not loaded. Load it yourself and pass the object to dtq.quantize"
        )
    for name, what in data.items():
        if not isinstance(what, list) or name.startswith("_"):
            continue
        if not _NAME.fullmatch(name):
            raise InputError(f"{index}: {name!r} is not the name of a component")
        if len(what) != 2 or not all(x is None or isinstance(x, str) for x in what):
            raise InputError(f"{index}: {name!r} must be [library, class], is {what!r}"[:300])
        if None not in what:
            found[name] = (what[0], what[1])
            _check_class(index, name, *found[name])
    return found


def check_links(path: Path) -> None:
    """Refuse symbolic links that lead out of the folder; those of the hub's cache stay in it.

    Raises:
        InputError: names the link.
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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, their headers read once.

    Raises:
        InputError: weights are only there as pickle, or an index names a file elsewhere.
        CheckpointError: a file is damaged or missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles and not files:
        raise InputError(
            f"{folder}: the weights are pickle ({pickles[0]}), which can run code; dtq reads "
            f"safetensors. If you trust the file, load it with diffusers and save_pretrained() it"
        )
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        _check_index(index)
    for file in files:
        opened(file)
    return files


def opened(file: Path) -> list[str]:
    """Names of the tensors of a safetensors file; reading them checks its header.

    Raises:
        CheckpointError: truncated or damaged.
    """
    try:
        with safe_open(file, framework="pt") as header:
            return list(header.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}); copy it again") from error


def skeleton(folder: Path, kind: Any) -> nn.Module:
    """A model on the meta device from its config, no larger than its files.

    Args:
        folder: of the model; without weight files the config alone decides, up to a limit.
        kind: the diffusers class.

    Raises:
        InputError: the config does not fit the class.
        CheckpointError: it asks for more than the files hold.
    """
    config = folder / "config.json"
    files = weight_files(folder)
    stored = sum(file.stat().st_size for file in files)
    tensors = sum(len(opened(file)) for file in files)
    try:
        with torch.device("meta"), bounded(config, tensors):
            model: nn.Module = kind.from_config(read_json(config))
    except LIBRARY_ERRORS as error:
        raise InputError(
            f"{config}: {kind.__name__} cannot be built from it ({first_line(error)})"
        ) from error
    tables = sum(b.numel() * b.element_size() for b in model.buffers())
    if tables > 2 * stored + SPARE_BYTES:
        raise CheckpointError(
            f"{config}: asks for tables of {tables} bytes, the weights are {stored}; a size in it "
            f"is damaged"
        )
    return model.eval()


@contextmanager
def bounded(config: Path, tensors: int) -> Iterator[None]:
    """Stop building a model that gets far more modules than there are tensors to fill them.

    Args:
        config: for the message.
        tensors: in the files; 0 for a config alone.

    Raises:
        CheckpointError: it would.
    """
    most, made = _MODULES_PER_TENSOR * tensors + 1000 if tensors else 200_000, 0

    def count(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise CheckpointError(
                f"{config}: asks for a model of more than {most} modules, the files hold "
                f"{tensors} tensors; a number of layers in it is damaged"
            )

    handle = hooks.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_shapes(
    config: str, model: nn.Module, found: Mapping[str, tuple[str, tuple[int, ...]]],
    planned: Mapping[str, object],
) -> None:  # fmt: skip
    """The file holds what the model has beside its quantized linears, as floats of its shapes.

    Args:
        config: for messages.
        model: the float model, on any device.
        found: name of a tensor in the file to its dtype, as safetensors writes it, and shape.
        planned: names of the quantized linears.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or packed without an entry in the
            plan.
    """
    for key, tensor in model.state_dict().items():
        name, _, part = key.rpartition(".")
        if name in planned and part != "bias":
            continue
        if key not in found:
            raise CheckpointError(f"{config}: the model has {key}, and the files do not hold it")
        dtype, shape = found[key]
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{key} has shape {list(shape)} in the file, {config} asks for {list(tensor.shape)}"
            )
        if tensor.is_floating_point() and dtype[0] not in "FB":
            raise CheckpointError(
                f"{key} is {dtype} in the file, and {config} has no entry in 'layers' that says "
                f"what that means"
            )


def _check_part(folder: Path, name: object) -> None:
    """One component: its configs, its files, its size as a model of the class ``name``."""
    weight_files(folder)
    scheduler = folder / "scheduler_config.json"
    if scheduler.is_file():
        steps = read_json(scheduler).get("num_train_timesteps", 1)
        if not isinstance(steps, int) or not 0 < steps <= MOST_TRAIN_STEPS:
            raise InputError(
                f"{scheduler}: 'num_train_timesteps' must be 1 to {MOST_TRAIN_STEPS}, is {steps!r}"
            )
    if not (folder / "config.json").is_file():
        return
    kind = model_kind(name)
    try:
        if kind is not None:
            skeleton(folder, kind)
    except InputError as error:
        if not _reads_its_weights(error.__cause__):
            raise


def _reads_its_weights(cause: BaseException | None) -> bool:
    """Whether a class failed because it looks at its own weights while it is built, which the meta
    device does not have; diffusers will build it. Torch has no class of errors for that."""
    said = str(cause)
    return isinstance(cause, RuntimeError | TypeError) and (
        "meta tensor" in said or "meta device" in said
    )


def model_kind(name: object) -> Callable[..., Any] | None:
    """The diffusers model of that name, None when there is none."""
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not inspect.isclass(kind) or not issubclass(kind, diffusers.ModelMixin):
        return None
    found: Callable[..., Any] = kind
    return found


def _check_class(index: Path, name: str, library: str, kind: str) -> None:
    """Importing a module runs it, so only what is known, or imported already, may be named."""
    if not kind.isidentifier():
        raise InputError(f"{index}: {name!r}: {kind!r} is not the name of a class")
    if library in _LIBRARIES or hasattr(pipelines, library):
        return
    imported = getattr(sys.modules.get(library), kind, None)
    if not hasattr(imported, "from_pretrained"):
        raise InputError(
            f"{index}: {name!r} is of the library {library!r}, whose code would be imported; only "
            f"{' and '.join(_LIBRARIES)} are. Import it yourself first if you trust it"
        )


def _check_index(index: Path) -> None:
    data = read_json(index)
    names = data.get("weight_map")
    if not isinstance(names, dict) or not isinstance(data.get("metadata"), dict):
        raise InputError(f"{index}: needs 'metadata' and 'weight_map', tensor names to file names")
    for key, name in names.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise InputError(
                f"{index}: weight_map[{key!r}] must be the name of a safetensors file beside the "
                f"index, is {name!r}"[:400]
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: missing, and {index.name} names it")
