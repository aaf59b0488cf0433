# SPDX-License-Identifier: Apache-2.0
"""GGUF files by the layers of diffusers, which the package gguf reads for them.

diffusers decodes the blocks to floats in every call, and multiplies these.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
from diffusers.loaders import FromOriginalModelMixin
from torch import nn

from dtq.engines.original import config_of, names_of_file
from dtq.engines.original.contents import PREFIX
from dtq.engines.runtimes.engine import Engine, EngineFile, unquantized
from dtq.errors import InputError
from dtq.pipelines.loading import translate_errors


def load(file: EngineFile) -> nn.Module:
    """The diffusers model with its GGUF layers.

    Classes that diffusers loads from single files are loaded so; for the others the same layers
    are put in.

    Raises:
        InputError: the file has original names, and diffusers reads no single files of the class.
    """
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    kind: Any = type(file.model)
    if issubclass(kind, FromOriginalModelMixin):
        return _from_single_file(file, kind)
    state = load_gguf_checkpoint(str(file.path))
    made = unquantized(file)
    if names_of_file([key.removeprefix(PREFIX) for key in state], made) is not None:
        raise InputError(
            f"{file.path} has original names, and diffusers reads no single files of "
            f"{kind.__name__}: write it with dtq export --names diffusers"
        )
    return _with_layers(file, made, state)


def _from_single_file(file: EngineFile, kind: Any) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder, translate_errors(file.path):
        Path(folder, "config.json").write_text(json.dumps(config_of(file.model)), encoding="utf-8")
        made: nn.Module = kind.from_single_file(
            str(file.path),
            config=folder,
            torch_dtype=file.dtype,
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=file.dtype),
        )
    return made.eval()


def _with_layers(file: EngineFile, made: nn.Module, state: dict[str, Any]) -> nn.Module:
    """What ``from_single_file`` does after it has read and renamed the tensors."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    plain = made.state_dict()
    _replace_with_gguf_linear(made, file.dtype, state)
    for key, value in state.items():
        name = key.removeprefix(PREFIX)
        module, _, own = name.rpartition(".")
        if not isinstance(value, GGUFParameter):  # a bias is lost when its linear is replaced
            value = nn.Parameter(plain[name], requires_grad=False)
        setattr(made.get_submodule(module), own, value)
    return made


ENGINE = Engine("gguf", ("gguf",), {"gguf": "gguf", "diffusers": "diffusers"}, load)
