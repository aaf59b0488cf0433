# SPDX-License-Identifier: Apache-2.0
"""Other projects' packages that run exported files: ``ENGINES`` lists them for ``dtq eval``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dtq.engines.load import read_checked, recognize
from dtq.engines.original import config_of
from dtq.engines.runtimes import comfy_kitchen, gguf, onnx, openvino, own, torchao
from dtq.engines.runtimes.engine import Engine, EngineFile
from dtq.engines.target import Target
from dtq.errors import InputError, hint

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        own.ENGINE,
        comfy_kitchen.ENGINE,
        gguf.ENGINE,
        torchao.ENGINE,
        onnx.ENGINE,
        openvino.ENGINE,
    )
}
"""Every engine; each has its page in ``docs/engines``."""

__all__ = ["ENGINES", "Engine", "EngineFile", "find_engine", "open_file", "run_by", "target_of"]


def find_engine(name: str) -> Engine:
    """The engine of a name, whose packages are installed.

    Raises:
        InputError: there is none, or its packages are missing; says which.
    """
    if name not in ENGINES:
        words = hint(name, ENGINES, f"engines: {', '.join(ENGINES)}")
        raise InputError(f"--candidate-engine {name!r} is no engine; {words}")
    ENGINES[name].check()
    return ENGINES[name]


def target_of(engine: Engine, path: Path) -> Target:
    """The target of a file that an engine runs.

    Raises:
        InputError: the file is of no target, or of one that the engine does not run.
    """
    target = recognize(path, readable=False)
    if target.name not in engine.runs:
        others = [name for name, each in ENGINES.items() if target.name in each.runs]
        raise InputError(
            f"{path} is a {target.name} file, and {engine.name} runs {', '.join(engine.runs)}; "
            f"give --candidate-engine {' or '.join(others)}"
        )
    return target


def open_file(
    engine: Engine, path: Path, model: nn.Module, dtype: torch.dtype = torch.float32
) -> EngineFile:
    """A file that an engine runs, checked against its model.

    Args:
        engine: that will run it.
        path: the file, or the folder.
        model: of the same class and configuration.
        dtype: of what the engine does not quantize, and of the inputs.

    Raises:
        InputError: as :func:`target_of`; a graph is of another class.
        CheckpointError: the file is damaged, or does not fit the model; names the tensor.
    """
    target = target_of(engine, path)
    if target.read:
        return EngineFile(path, target, model, read_checked(path, config_of(model))[1], dtype)
    contents, kind = target.describe(path), type(model).__name__
    if contents.config.get("_class_name") != kind:
        raise InputError(f"{path} is of {contents.config.get('_class_name')}, not of {kind}")
    return EngineFile(path, target, model, contents, dtype)


def run_by(
    name: str, path: Path, model: nn.Module, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model of a file, run by an engine; it is called as ``model`` is.

    Args:
        name: key of ``ENGINES``.
        path: the file, or the folder.
        model: as for :func:`open_file`.
        dtype: as for :func:`open_file`.

    Raises:
        InputError: as :func:`find_engine` and :func:`open_file`.
        CheckpointError: as :func:`open_file`.
    """
    engine = find_engine(name)
    return engine.load(open_file(engine, path, model, dtype))
