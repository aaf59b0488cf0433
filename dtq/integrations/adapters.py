# SPDX-License-Identifier: Apache-2.0
"""Load an adapter file: LoRA, DoRA, LoKr or LoHa, in any layout that diffusers knows for LoRA.

diffusers loads LoRA files, and LoKr for two families. It leaves out ``dora_scale``, with a warning,
and knows no LoHa. This loads all of them onto float and quantized models alike; peft's layers, and
those of dtq on quantized linears, do the work.

This module needs peft.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.integrations.adapter_file import Factors, listed, read_adapter
from dtq.integrations.adapter_names import TEXT, find_layers
from dtq.integrations.fuse import CONVOLUTION, TABLE
from dtq.nn.conv import QuantConv
from dtq.nn.linear import QuantLinear
from dtq.nn.weight_only import WeightOnly
from dtq.plan.layers import COMPUTE_DTYPES

log = logging.getLogger("dtq")


def load_adapter(
    model: Any,
    file: str | Path | Mapping[str, Tensor],
    name: str = "default",
    *,
    weight: float = 1.0,
    component: str | None = None,
    text_encoders: bool = True,
) -> list[str]:
    """Load an adapter in addition to those that are loaded; it alone is active afterwards.

    ``set_adapters`` (which also activates several), ``disable_lora``, ``delete_adapters``,
    ``fuse_lora`` and ``unload_lora_weights`` of diffusers then treat it as they do a LoRA.

    Args:
        model: a pipeline of diffusers, or a transformer or U-Net; float or quantized. A pipeline
            knows more layouts of names.
        file: a safetensors file with LoRA, DoRA, LoKr or LoHa, or its tensors.
        name: what to call the adapter.
        weight: strength; 1 is the strength it was trained with.
        component: of a pipeline; None for its ``transformer`` or ``unet``.
        text_encoders: False leaves out what the file has for text encoders; True refuses it.

    Returns:
        Names of the layers that have the adapter.

    Raises:
        InputError: the file is no such adapter or is for other layers, or the name is taken or
            cannot be used.
    """
    pipeline, target = _target(model, component)
    if not name or "." in name:
        raise InputError(f"an adapter cannot be called {name!r}: give a name without dots")
    layers = read_adapter(file)
    text = [key for key in layers if key.startswith(TEXT)]
    if text and text_encoders:
        raise InputError(
            f"the adapter has {len(text)} layers of text encoders ({text[0]}), which dtq does not "
            f"load; leave them out with text_encoders=False, or load a LoRA with "
            f"load_lora_weights of the pipeline"
        )
    layers = {key: factors for key, factors in layers.items() if key not in text}
    kinds = Counter(factors.kind for factors in layers.values())
    if len(kinds) != 1:
        many = ", ".join(f"{count} of {kind}" for kind, count in kinds.items()) or "none"
        raise InputError(f"an adapter has layers of one kind, and this one has {many}")
    if name in getattr(target, "peft_config", {}):
        raise InputError(f"an adapter {name!r} is loaded already; choose another name")
    parts = find_layers(target, layers, pipeline)
    made = {n: layers[part.source].rows(part.rows) for n, part in parts.items()}
    _check_layers(target, made)
    (kind,) = kinds
    peft.inject_adapter_in_model(_config(kind, made), target, name, low_cpu_mem_usage=True)
    for layer in target.modules():  # peft leaves adapters of other kinds active
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(name)
    for layer_name, factors in made.items():
        _fill(target.get_submodule(layer_name), name, factors, weight)
    target._hf_peft_config_loaded = True  # diffusers asks for it before it does anything
    log.info("dtq: %s %r on %d layers", kind, name, len(made))
    return [*made]


def _target(model: Any, component: str | None) -> tuple[Any, Any]:
    """The pipeline, or None, and the model that gets the adapter.

    Raises:
        InputError: the pipeline has no such component, or a model is given with one.
    """
    if isinstance(model, nn.Module):
        if component is not None:
            raise InputError("component= names a part of a pipeline, and a model was given")
        return None, model
    names = ("transformer", "unet") if component is None else (component,)
    found = [getattr(model, n) for n in names if isinstance(getattr(model, n, None), nn.Module)]
    if not found:
        raise InputError(f"{type(model).__name__} has no {' or '.join(names)}: give component=")
    return model, found[0]


def _check_layers(model: nn.Module, made: Mapping[str, Factors]) -> None:
    """Check what peft would find in the middle of its work.

    Raises:
        InputError: layers are offloaded, or replaced convolutions.
    """
    bases: dict[str, Any] = {}
    for name in made:
        module: Any = model.get_submodule(name)
        bases[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    away = [name for name, base in bases.items() if base.weight.is_meta]
    if away:
        raise InputError(listed("load adapters before offloading the model; offloaded are", away))
    convolutions = [
        name
        for name, base in bases.items()
        if isinstance(base, QuantConv) or (isinstance(base, QuantLinear) and base.spatial)
    ]
    if convolutions:
        raise InputError(listed(f"{CONVOLUTION}. Such layers are", convolutions))
    tables = [name for name, base in bases.items() if isinstance(base, WeightOnly)]
    if tables:
        raise InputError(listed(f"{TABLE}. Such layers are", tables))


def _config(kind: str, made: Mapping[str, Factors]) -> Any:
    """The config of peft for the adapter; ranks and strengths by layer are exact names."""
    ranks = {f"^{re.escape(n)}": _rank(factors) for n, factors in made.items()}
    alphas = {f"^{re.escape(n)}": _rank(factors) * factors.scale for n, factors in made.items()}
    common: dict[str, Any] = {
        # a list would match the ends of names
        "target_modules": "|".join(re.escape(name) for name in made),
        "r": Counter(ranks.values()).most_common(1)[0][0],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    if kind == "LoHa":
        return peft.LoHaConfig(**common)
    if kind == "LoKr":
        return peft.LoKrConfig(**common)
    return peft.LoraConfig(**common, use_dora=kind == "DoRA")


def _rank(factors: Factors) -> int:
    """The rank for peft, which makes whole factors of LoKr when it is large."""
    return factors.rank or max(factors.tensors["lokr_w2"].shape)


def _fill(layer: Any, name: str, factors: Factors, weight: float) -> None:
    """Put the tensors of the file into a layer of peft, in place of those that it made.

    peft derives the shapes of LoKr from one number for the whole model; files have others.
    """
    base = layer.get_base_layer()
    dtype = base.compute_dtype if isinstance(base, QuantLinear) else base.weight.dtype
    if dtype not in COMPUTE_DTYPES:  # stored in float8, or quantized by another library
        dtype = torch.float32
    values = {
        key: nn.Parameter(tensor.to(base.weight.device, dtype), requires_grad=False)
        for key, tensor in factors.tensors.items()
    }
    if isinstance(layer, LoraLayer):
        layer.lora_A[name].weight, layer.lora_B[name].weight = values["lora_A"], values["lora_B"]
        if "dora_scale" in values:
            layer.lora_magnitude_vector[name].weight = values["dora_scale"]
    else:
        for kind in layer.adapter_layer_names:
            if name in (kept := getattr(layer, kind)):
                del kept[name]
        for key, value in values.items():
            getattr(layer, key)[name] = value
    assert not any(p.is_meta for p in layer.parameters())
    layer.set_scale(name, weight)
