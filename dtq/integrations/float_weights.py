# SPDX-License-Identifier: Apache-2.0
"""Patches of code in diffusers that reads the float weights of a model, which is quantized here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dtq.errors import InputError
from dtq.nn.linear import QuantLinear


def refuse_quantized_control_nets() -> None:
    """Make ``from_transformer`` of ControlNets refuse a quantized transformer.

    It copies weights by name with ``load_state_dict(strict=False)``, which takes int8 codes of the
    right shape for weights: the ControlNet would be noise. Classes that share modules instead of
    copying have no such argument.
    """
    from diffusers.models import controlnets

    for kind in vars(controlnets).values():
        made = vars(kind).get("from_transformer") if isinstance(kind, type) else None
        if not isinstance(made, classmethod) or hasattr(made.__func__, "dtq"):
            continue
        if "load_weights_from_transformer" in inspect.signature(made.__func__).parameters:
            kind.from_transformer = classmethod(_of_floats(made.__func__))  # type: ignore[attr-defined]


def report_flux_shapes() -> None:
    """Give the LoRA loader of Flux the shape of a quantized linear, whose ``weight`` is packed.

    It compares that shape with the adapter's, and widens a layer where the adapter is larger; a
    quantized layer cannot be widened.
    """
    from diffusers.loaders import lora_pipeline

    flux = lora_pipeline.FluxLoraLoaderMixin
    shape = flux._calculate_module_shape
    expand = lora_pipeline._maybe_dequantize_weight_for_expanded_lora
    if hasattr(expand, "dtq"):
        return

    def module_shape(
        model: nn.Module,
        base_module: nn.Module | None = None,
        base_weight_param_name: str | None = None,
    ) -> torch.Size:
        module = base_module
        if base_weight_param_name:
            module = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
        if isinstance(module, QuantLinear):
            return torch.Size((module.out_features, module.in_features))
        return shape(model, base_module, base_weight_param_name)

    def expandable_weight(model: nn.Module, module: nn.Module) -> Any:
        if isinstance(module, QuantLinear):
            raise InputError(
                f"this adapter widens a linear of {module.in_features} inputs that is quantized; "
                f"exclude that layer from quantization: modules_to_not_convert, or exclude: in "
                f"the recipe"
            )
        return expand(model, module)

    expandable_weight.dtq = True  # type: ignore[attr-defined]
    flux._calculate_module_shape = staticmethod(module_shape)
    lora_pipeline._maybe_dequantize_weight_for_expanded_lora = expandable_weight


def _of_floats(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def from_transformer(cls: Any, transformer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(m, QuantLinear) for m in transformer.modules()):
            raise InputError(
                f"{cls.__name__}.from_transformer copies float weights, and this transformer is "
                f"quantized; give the float model, or dequantize() a copy of this one"
            )
        return make(cls, transformer, *args, **kwargs)

    from_transformer.dtq = True  # type: ignore[attr-defined]
    return from_transformer
