# SPDX-License-Identifier: Apache-2.0
"""Run a pipeline without weights: its own loop and scheduler, its models on fake tensors.

The call is that of diffusers, with real latents, so every shape is the one of a real run: guidance,
resolution, frames, prompt length. A model gets fake copies of its inputs, and the pipeline gets
zeros of the shapes of its outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter, tree_map_only

from dtq.estimate.live_bytes import LiveBytes
from dtq.io.safe_parse import read_json
from dtq.pipelines.loading import translate_errors
from dtq.pipelines.validation import components, meta_model

METHODS = ("forward", "encode", "decode", "generate", "get_image_features", "get_text_features")
"""Methods by which pipelines call their models."""


def meta_pipeline(folder: Path) -> Any:
    """The pipeline of a folder, its models on the meta device and in the dtype of float32.

    Tokenizers and schedulers are read as they are.

    Args:
        folder: of a pipeline; its weight files are not read and may be missing.

    Raises:
        InputError: a component or the pipeline cannot be built; names the file.
        CheckpointError: a config describes a model of absurd size.
    """
    index = folder / "model_index.json"
    parts: dict[str, Any] = {**meta_modules(folder)}
    for name, (library, kind_name) in components(index).items():
        if name not in parts:
            with translate_errors(folder / name):
                kind: Any = simple_get_class_obj(library, kind_name)
                parts[name] = kind.from_pretrained(folder / name)
    entries = read_json(index)
    optional = {k: None for k, v in entries.items() if v == [None, None]}
    plain = {k: v for k, v in entries.items() if k[0] != "_" and not isinstance(v, list)}
    with translate_errors(index):
        pipeline = getattr(diffusers, entries["_class_name"])(**parts, **optional, **plain)
    pipeline.register_to_config(_name_or_path=str(folder))
    return pipeline


def meta_modules(folder: Path) -> dict[str, nn.Module]:
    """The models of a pipeline folder on the meta device, in the dtype of float32.

    Args:
        folder: of a pipeline; only its configs are read.

    Raises:
        InputError: a model cannot be built; names the file.
        CheckpointError: a config describes a model of absurd size.
    """
    parts = {}
    for name, (library, kind_name) in components(folder / "model_index.json").items():
        with translate_errors(folder / name):
            kind: Any = simple_get_class_obj(library, kind_name)
            if issubclass(kind, nn.Module):
                parts[name] = meta_model(folder / name, kind, ())
    return parts


@dataclass
class Activations:
    """Bytes of tensors other than weights, at their peaks.

    Attributes:
        components: while each model runs, with what the pipeline holds then.
        total: of the whole call.
    """

    components: dict[str, int] = field(default_factory=dict)
    total: int = 0


class FakeRun:
    """Runs a pipeline on fake tensors; a context manager.

    Inside, the parameters of its models are fake. Afterwards they are back.

    Args:
        pipeline: of diffusers; its models may be on any device, meta included.
    """

    def __init__(self, pipeline: Any) -> None:
        self.models = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.bytes = LiveBytes()
        self.activations = Activations()
        self._stack = ExitStack()
        self._depth = 0

    def __enter__(self) -> FakeRun:
        for name, model in self.models.items():
            self._stack.enter_context(self._fake_weights(model))
            for method in METHODS:
                if hasattr(model, method):
                    vars(model)[method] = self._counted(name, getattr(model, method))
                    self._stack.callback(vars(model).pop, method)
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(self.bytes)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self.activations.total = self.bytes.peak

    @contextmanager
    def _fake_weights(self, model: nn.Module) -> Iterator[None]:
        """Fake parameters and buffers on the CPU in place of those of a model."""
        places = []
        fakes: dict[int, Tensor] = {}
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is not None:
                        places.append((store, name, tensor))
                        store[name] = fakes.setdefault(id(tensor), self._like(tensor))
        self.bytes.ignore(fakes.values())
        try:
            yield
        finally:
            for store, name, tensor in places:
                store[name] = tensor

    def _like(self, tensor: Tensor) -> Tensor:
        with self.mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake

    def _counted(self, name: str, method: Any) -> Any:
        """A method of a model on fake tensors, with the signature that pipelines look at."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, method, *args, **kwargs)

        return call

    def _call(self, name: str, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a method of a model on fake copies of its inputs."""
        if self._depth:  # the model calls itself
            return method(*args, **kwargs)
        outer, self.bytes.peak = self.bytes.peak, self.bytes.live
        self._depth += 1
        try:
            with self.mode, self.bytes:
                result = method(*self._fake(args), **self._fake(kwargs))
        finally:
            self._depth -= 1
            mine = self.activations.components
            mine[name] = max(mine.get(name, 0), self.bytes.peak)
            self.bytes.peak = max(outer, self.bytes.peak)
        self.bytes.ignore(t for t in tree_iter(result) if isinstance(t, FakeTensor))
        return _real(result)

    def _fake(self, value: Any) -> Any:
        """Fake copies of tensors; the real ones are counted already."""

        def convert(tensor: Tensor) -> Tensor:
            if isinstance(tensor, FakeTensor):
                return tensor
            fake = self.mode.from_tensor(tensor, static_shapes=True)
            self.bytes.ignore([fake])
            return fake

        return tree_map_only(Tensor, convert, value)


def _real(value: Any) -> Any:
    """Zeros in place of fake tensors, also in attributes of outputs that are no containers."""
    if isinstance(value, FakeTensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    if hasattr(value, "parameters") and isinstance(value.parameters, FakeTensor):
        for name, tensor in vars(value).items():  # a distribution of latents
            if isinstance(tensor, FakeTensor):
                setattr(value, name, torch.zeros(tensor.shape, dtype=tensor.dtype))
        return value
    if isinstance(value, dict):
        made = {key: _real(item) for key, item in value.items()}
        return type(value)(**made)
    if isinstance(value, tuple | list):
        return type(value)(_real(item) for item in value)
    return value
