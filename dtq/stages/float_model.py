# SPDX-License-Identifier: Apache-2.0
"""Checks of the float model: quantized linears would lose adapters, fused projections and hooks."""

from __future__ import annotations

from collections.abc import Iterable

from diffusers.models.attention_processor import Attention
from torch import nn

from dtq.errors import InputError


def check_float_model(model: nn.Module) -> None:
    """Check that a float model has the layers of its class.

    What ``unfuse_qkv_projections`` leaves behind in older classes of attention is removed.

    Raises:
        InputError: adapters are loaded, or q, k and v are fused; says how to undo it.
    """
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
        if hasattr(linear, "_hf_hook") or hasattr(linear, "_diffusers_hook"):
            what = "offloading or layerwise casting is on (for {} for example)"
        elif own:
            what = "{} has forward hooks"
        raise InputError(
            f"{what.format(name)}, and the quantized layer would not have it: undo it and do it "
            f"again on the quantized model, or exclude the layer with modules_to_not_convert"
        )
