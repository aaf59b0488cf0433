# SPDX-License-Identifier: Apache-2.0
"""What an engine is to ``dtq eval``: a package that runs a file in place of a transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn

from dtq.engines.original import config_of
from dtq.engines.target import Contents, Target
from dtq.errors import InputError
from dtq.version import __version__


@dataclass(frozen=True)
class EngineFile:
    """A file, and the model that an engine makes of it.

    Attributes:
        path: of the file, or of the folder.
        target: that it is of.
        model: of the same class and configuration, float or quantized by dtq; it is not changed.
        contents: what is in the file, checked against the model, under the names of diffusers; of a
            graph, which dtq does not read, config and recipe alone.
        dtype: of what the engine does not quantize, and of the inputs.
    """

    path: Path
    target: Target
    model: nn.Module
    contents: Contents
    dtype: torch.dtype


@dataclass(frozen=True)
class Engine:
    """A row of the table of engines.

    Attributes:
        name: key of ``ENGINES``.
        runs: names of the targets whose files it runs.
        packages: distributions that run them, by the module that is imported; none: dtq itself.
        load: the model of a file, run by these packages; it is called as ``file.model`` is.
    """

    name: str
    runs: tuple[str, ...]
    packages: dict[str, str]
    load: Callable[[EngineFile], nn.Module]

    @property
    def versions(self) -> str:
        """The packages and their versions, such as ``gguf 0.19.0, diffusers 0.42.1``."""
        others = ", ".join(f"{name} {version(name)}" for name in self.packages.values())
        return others or f"{self.name} {__version__}"

    def check(self) -> None:
        """Check that the packages are installed.

        Raises:
            InputError: they are not; says how to install them.
        """
        missing = [name for module, name in self.packages.items() if find_spec(module) is None]
        if missing:
            raise InputError(
                f"--candidate-engine {self.name} needs {' and '.join(missing)}: "
                f"pip install {' '.join(missing)}"
            )


def unquantized(file: EngineFile) -> nn.Module:
    """The diffusers model of a file, without the weights of its quantized linears.

    Args:
        file: no graph.

    Returns:
        The model in evaluation mode, in the dtypes of ``file.model``. The missing weights have no
        memory.
    """
    kind: type[nn.Module] = type(file.model)
    with init_empty_weights(include_buffers=False):
        made: nn.Module = kind.from_config(config_of(file.model))  # type: ignore[attr-defined]
    dtypes = {key: tensor.dtype for key, tensor in file.model.state_dict().items()}
    state = {
        key: tensor.to(dtypes.get(key, file.dtype) if tensor.is_floating_point() else tensor.dtype)
        for key, tensor in file.contents.others.items()
    }
    made.load_state_dict(state, strict=False, assign=True)
    return made.eval().requires_grad_(False)
