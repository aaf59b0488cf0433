# SPDX-License-Identifier: Apache-2.0
"""The float model of an export, whose quantized linears a target replaces by its own modules."""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights
from torch import nn

from dtq.engines.target import Contents
from dtq.errors import InputError
from dtq.pipelines.validation import model_kind


def float_model(contents: Contents) -> nn.Module:
    """The diffusers model of an export, in float32; weights of quantized linears are missing.

    Args:
        contents: from a quantized model, with its config.

    Returns:
        The model. Weights of quantized linears are on the meta device.

    Raises:
        InputError: the config names no model of diffusers.
    """
    name = contents.config.get("_class_name")
    kind: Any = model_kind(name)
    if kind is None:
        raise InputError(f"diffusers has no model {name!r}")
    with init_empty_weights(include_buffers=False):
        model: nn.Module = kind.from_config(contents.config)
    state = {k: t.float() if t.is_floating_point() else t for k, t in contents.others.items()}
    model.load_state_dict(state, strict=False, assign=True)
    return model.eval().requires_grad_(False)
