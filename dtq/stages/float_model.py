# SPDX-License-Identifier: Apache-2.0
"""Checks of the float model: quantized linears would lose adapters, fused projections and hooks."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.models import is_of_transformers
from dtq.models.linears import is_hooked, linears_of
from dtq.pipelines.stored_tensors import is_saturated


def check_float_model(model: nn.Module, name: str) -> None:
    """Check that a float model has the layers and the plain weights of its class.

    What ``unfuse_qkv_projections`` leaves behind in older classes of attention is removed.

    Raises:
        InputError: adapters are loaded; q, k and v are fused; the model is compiled or cached; or
            its weights are codes. Says how to undo it.
    """
    _check_adapters(model)
    _check_weights(model, name)
    _check_plain(model)


def kept_in_float(model: nn.Module) -> tuple[str, ...]:
    """Layers that a library keeps in float32."""
    return tuple(sorted(float32_modules(model, getattr(model, "dtype", torch.float32))))


def tied_weights(model: nn.Module) -> tuple[str, ...]:
    """Names of the weights that several modules of a model share."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return tuple(sorted({*tied, *tied.values()}))


def float32_modules(model: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of modules and parameters that stay float32 when a library loads a model in a dtype.

    diffusers keeps them whatever the dtype is. transformers keeps some for float16 alone, whose
    range is too small for them.
    """
    names = getattr(model, "_keep_in_fp32_modules", None) or ()
    if not is_of_transformers(model):
        return tuple(names)
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return tuple(sorted({*strict, *(names if dtype == torch.float16 else ())}))


def _check_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise InputError(
                f"an adapter is loaded (on {name} for example): fuse_lora() and then "
                f"unload_lora_weights() to quantize its sum with the model, or "
                f"unload_lora_weights() and load it into the quantized model"
            )
        if not getattr(module, "fused_projections", False):
            continue
        if not isinstance(module, Attention) or "Fused" in type(module.processor).__name__:
            raise InputError(
                f"q, k and v are fused (in {name} for example), and a folder with fused "
                f"projections cannot be loaded: call unfuse_qkv_projections() before quantizing"
            )
        _remove_fused(module)


def _remove_fused(attention: Attention) -> None:
    """Remove fused projections that are no longer in use; its class has no method for it."""
    for name in ("to_qkv", "to_kv", "to_added_qkv"):
        if hasattr(attention, name):
            delattr(attention, name)
    attention.fused_projections = False


def check_forwards(model: nn.Module, names: Iterable[str]) -> None:
    """Check that linears compute what their class computes, and nothing else listens to them.

    Args:
        model: the float model.
        names: of the linears that are going to be replaced.

    Raises:
        InputError: a ``forward`` has been replaced, or there are hooks; says by what, as far as
            that is known.
    """
    for name in names:
        linear = model.get_submodule(name)
        own = getattr(linear.forward, "__func__", None) is type(linear).forward
        hooks = linear._forward_hooks or linear._forward_pre_hooks
        if own and not hooks:
            continue
        what = "the forward of {} has been replaced, by an adapter for example"
        if is_hooked(linear):
            what = "offloading or layerwise casting is on (for {} for example)"
        elif own:
            what = "{} has forward hooks"
        raise InputError(
            f"{what.format(name)}, and the quantized layer would not have it: undo it and do it "
            f"again on the quantized model, or exclude the layer with modules_to_not_convert"
        )


def _check_plain(model: nn.Module) -> None:
    """Refuse a model whose calls may skip layers (a cache), or hooks on them (a compiled graph)."""
    cached = bool(getattr(model, "is_cache_enabled", False) or getattr(model, "_is_cached", False))
    for module in model.modules():
        calls = (module.__call__, vars(module).get("forward"), module._compiled_call_impl)
        if any(hasattr(call, "_torchdynamo_orig_callable") for call in calls):
            raise InputError(
                f"{type(model).__name__} is compiled, and a compiled graph has no hooks on its "
                f"layers: quantize the plain model, and compile it afterwards"
            )
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        homes = {type(hook).__module__.rpartition(".")[2] for hook in hooks.values()}
        cached |= any("cache" in home or home.endswith("broadcast") for home in homes)
    if cached:
        raise InputError(
            f"a cache of {type(model).__name__} is on, so that calibration would see a part of its "
            f"calls: disable_cache() first, quantize, and enable the cache afterwards"
        )


def _check_weights(model: nn.Module, name: str) -> None:
    """Refuse weights that are codes: integers, or FP8 codes that were loaded without their scale.

    Codes reach the largest value of FP8 in every layer that has them: the first layer of each name
    without indices is enough.
    """
    kinds: dict[str, str] = {}
    for layer, module in linears_of(model):
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point():
            raise InputError(f"{name}: {layer}.weight is {weight.dtype}; give the float model")
        kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", "", layer), layer)
    for layer in kinds.values():
        weight = model.get_submodule(layer).weight
        if weight.device.type != "meta" and is_saturated(weight):  # type: ignore[union-attr, arg-type]
            raise InputError(
                f"{name}: the largest entry of {layer}.weight is the largest value of FP8: these "
                f"are codes without their scale; give the float model"
            )
