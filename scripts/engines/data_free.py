# SPDX-License-Identifier: Apache-2.0
"""What a data-free quantizer of an engine is, and a file of dtq's writer with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from dtq.engines import TARGETS
from dtq.engines.export import contents_of
from dtq.engines.runtimes import ENGINES, run_by
from dtq.engines.target import StoredLayer, stored_bytes
from dtq.models.linears import matrix_of


def bytes_of_file(model: nn.Module, path: Path) -> int:
    """Bytes of a file or folder, without the text of a graph next to its data."""
    data = path.with_suffix(".bin")
    return stored_bytes(data if data.is_file() else path)


def bytes_of_weights(model: nn.Module, path: Path) -> int:
    """Bytes of all tensors in the weights of a model, which may be tensors of an engine."""
    return sum(
        part.numel() * part.element_size()
        for weight in model.parameters()
        for part in (
            [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
            if hasattr(weight, "__tensor_flatten__")
            else [weight]
        )
        if isinstance(part, Tensor)
    )


@dataclass(frozen=True)
class Quantizer:
    """A quantizer of an engine.

    Attributes:
        engine: that runs both files, a key of ``ENGINES`` unless there is ``load``.
        packages: distributions of the quantizer, by the module that is imported.
        make: the float model with the layers of a quantized one in the same layouts, run by the
            engine: from the quantized model, the float model, which it may change, and a path that
            it may write.
        nbytes: of a model that the engine runs, or of its file; equal for both.
        overrides: recipe keys with which the quantizer has the format of every layer.
        load: the model of a file, from its path and the float model.
    """

    engine: str
    packages: Mapping[str, str]
    make: Callable[[nn.Module, nn.Module, Path], nn.Module]
    nbytes: Callable[[nn.Module, Path], int] = bytes_of_file
    overrides: Mapping[str, str] = field(default_factory=dict)
    load: Callable[[Path, nn.Module], nn.Module] | None = None

    def run(self, path: Path, floats: nn.Module) -> nn.Module:
        """The model of a file, run by the engine."""
        return self.load(path, floats) if self.load else run_by(self.engine, path, floats)

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed, of the quantizer and of the engine."""
        engine = {} if self.load else ENGINES[self.engine].packages
        both = {**engine, **self.packages}
        return [name for module, name in both.items() if find_spec(module) is None]


def file_of(target: str, stem: Path) -> Path:
    """The path of a target's file."""
    return stem.with_suffix(TARGETS[target].suffix)


def rewritten(
    target: str, engine: str, numbers: Callable[[StoredLayer, Tensor], dict[str, Tensor]]
) -> Callable[[nn.Module, nn.Module, Path], nn.Module]:
    """A ``make`` by the writer of a target.

    Args:
        target: name of it.
        engine: that runs the file.
        numbers: packed tensors of a layer's format from its float weight (N, K).
    """

    def make(made: nn.Module, floats: nn.Module, path: Path) -> nn.Module:
        contents = contents_of(made)
        layers, others = {}, dict(contents.others)
        for name, layer in contents.layers.items():
            old = floats.get_submodule(name)
            layers[name] = replace(layer, tensors=numbers(layer, matrix_of(old).detach().float()))
            if isinstance(old.bias, Tensor):  # without dtq's bias correction
                others[f"{name}.bias"] = old.bias.detach().to(others[f"{name}.bias"].dtype)
        TARGETS[target].write(replace(contents, layers=layers, others=others), path)
        return run_by(engine, path, floats)

    return make
