# SPDX-License-Identifier: Apache-2.0
"""Folders with torchao's tensors, loaded by diffusers and run by torchao."""

from __future__ import annotations

from typing import Any

from torch import nn

from dtq.engines.runtimes.engine import Engine, EngineFile
from dtq.pipelines.loading import translate_errors


def load(file: EngineFile) -> nn.Module:
    """The model as ``from_pretrained`` gives it."""
    kind: Any = type(file.model)
    with translate_errors(file.path):
        made: nn.Module = kind.from_pretrained(file.path, torch_dtype=file.dtype)
    return made.eval()


ENGINE = Engine("torchao", ("torchao",), {"torchao": "torchao", "diffusers": "diffusers"}, load)
