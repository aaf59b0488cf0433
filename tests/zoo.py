# SPDX-License-Identifier: Apache-2.0
"""Every transformer and U-Net class of diffusers as a tiny random model, with arguments of one forward.

``zoo.json`` maps the name of a class to ``init``, its configuration, and ``inputs``; a tensor is
``{"__t__": shape, "dtype": ..., "val" or "fill": ...}``, random if it has no value. Most
configurations have the sizes of diffusers' own tests (Apache-2.0).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any

import diffusers.models.transformers
import diffusers.models.unets
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

FIVE = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
)
"""Classes that differ most from each other, for tests of what holds for all."""


def classes() -> dict[str, type[nn.Module]]:
    """Every denoiser class of diffusers, exported or not: its transformers and its U-Nets."""
    result = {}
    for package in (diffusers.models.transformers, diffusers.models.unets):
        for module in pkgutil.iter_modules(package.__path__):
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            for name, kind in vars(loaded).items():
                if (
                    inspect.isclass(kind)
                    and issubclass(kind, ModelMixin)
                    and kind.__module__ == loaded.__name__
                ):
                    result[name] = kind
    del result["MotionAdapter"]  # a part of UNetMotionModel
    for name in ("AudioLDM2UNet2DConditionModel", "UNetControlNetXSModel"):  # kept elsewhere
        result[name] = getattr(diffusers, name)
    return dict(sorted(result.items()))


@functools.cache
def _configs() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "zoo.json").read_text())


def names() -> list[str]:
    return [*_configs()]


def model(name: str) -> nn.Module:
    """The tiny model, random, in evaluation mode; parameters that start at zero are random too."""
    torch.manual_seed(0)
    built = classes()[name](**_value(_configs()[name]["init"], torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            if parameter_name.endswith("pad_token"):  # diffusers does not initialize it
                parameter.zero_()
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)
    return built.eval()


def inputs(name: str, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one forward."""
    return _value(_configs()[name]["inputs"], torch.Generator().manual_seed(seed))


def output(model: nn.Module, name: str) -> torch.Tensor:
    """The first output of one forward; several tensors as one."""
    with torch.no_grad():
        y = model(**inputs(name), return_dict=False)[0]
    return y if isinstance(y, torch.Tensor) else torch.cat([each.flatten() for each in y])


def _value(v: Any, rng: torch.Generator) -> Any:
    if isinstance(v, list):
        return [_value(x, rng) for x in v]
    if not isinstance(v, dict):
        return v
    if "__t__" in v:
        dtype = getattr(torch, v["dtype"])
        if "val" in v:
            return torch.tensor(v["val"], dtype=dtype).reshape(v["__t__"])
        if "fill" in v:
            return torch.full(v["__t__"], v["fill"], dtype=dtype)
        return torch.randn(v["__t__"], generator=rng).to(dtype)
    if "__items__" in v:
        return {k: _value(x, rng) for k, x in v["__items__"]}
    if "__tuple__" in v:
        return tuple(_value(x, rng) for x in v["__tuple__"])
    if "__call__" in v:
        module, function = v["__call__"].split(":")
        return getattr(importlib.import_module(module), function)(*v["args"])
    return {k: _value(x, rng) for k, x in v.items()}
