# SPDX-License-Identifier: Apache-2.0
"""DoRA on quantized linears: the rows of the dequantized weight plus the LoRA have learned norms.

``W' = m (W + s B A) / ||W + s B A||`` row by row (Liu et al. 2024, "DoRA: Weight-Decomposed
Low-Rank Adaptation", eq. 5). The layer computes it from its own output, so the packed weight does
not change: ``y' = y + (g - 1) (y - b) + g s B A x`` with ``g = m / ||W + s B A||``. peft's layer
reads a float weight, and multiplies by an identity matrix of K x K in every call; its names and
settings are kept.

This module needs peft.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.nn.linear import QuantLinear
from dtq.nn.step_clock import in_graph

_OFFLOADED = (
    "adapter {} is DoRA, which reads the weight outside of the linear, and layers are offloaded "
    "one by one; offload whole models or groups (enable_model_cpu_offload, enable_group_offload)"
)


class QuantDora(DoraLinearVariant):  # type: ignore[misc]
    """peft's DoRA of a linear, with norms of the dequantized weight."""

    @staticmethod
    def init(module: Linear, adapter_name: str, **kwargs: Any) -> None:
        """Give an adapter its magnitudes: the row norms of the weight with the LoRA.

        Args:
            module: peft's layer.
            adapter_name: its LoRA is there already.
            **kwargs: of peft; not used.

        Raises:
            InputError: the linear is offloaded by itself.
        """
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = DoraLinearLayer(fan_in_fan_out=False)
        layer.weight = nn.Parameter(_row_norms(module, adapter_name))
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def forward(
        module: Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The output with the adapter.

        The norms are a constant for the gradient (section 4.3 of the paper).

        Args:
            module: peft's layer.
            active_adapter: name of the adapter.
            x: float (..., K).
            result: (..., N), the output without the adapter.
            **kwargs: of peft; not used.

        Returns:
            float (..., N).

        Raises:
            InputError: the linear is offloaded by itself, as in sequential offloading.
        """
        magnitude = module.lora_magnitude_vector[active_adapter].weight  # (N,)
        if magnitude.is_meta or module.get_base_layer().weight.is_meta:
            raise InputError(_OFFLOADED.format(repr(active_adapter)))
        gain = magnitude / _norms(module, active_adapter)
        dropout = module.lora_dropout[active_adapter]
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            plain = module.base_layer(x)
        else:
            plain = result
        bias = module.get_base_layer().bias
        if bias is not None:
            plain = plain - bias
        low_rank = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        # g - 1 is small: multiplied separately, because a bfloat16 near 1 has steps of 1/128
        return (
            result + (gain - 1) * plain + gain * (low_rank * module.scaling[active_adapter])
        )  # (..., N)


class _Kept(NamedTuple):
    """Row norms, and what they were computed from."""

    down: Tensor  # (R, K)
    up: Tensor  # (N, R)
    scaling: float
    weight: tuple[tuple[ReferenceType[nn.Parameter], int], ...]
    norms: Tensor  # (N,)


_kept: WeakKeyDictionary[nn.Module, dict[str, _Kept]] = WeakKeyDictionary()
"""By layer and adapter. Not an attribute: copies of a layer have other parameters."""


def _norms(module: Linear, name: str) -> Tensor:
    """Row norms (N,); outside training they are kept while nothing they depend on changes.

    Factors are compared by value: hot swapping writes into them without a trace. Inside a graph,
    which cannot wait for a comparison, every replay computes the norms.
    """
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    if module.training or in_graph(down):
        return _row_norms(module, name)
    scaling = float(module.scaling[name])
    kept = _kept.setdefault(module, {}).get(name)
    if (
        kept is not None
        and kept.scaling == scaling
        and _is_weight(kept.weight, module)
        and _equal(kept.down, down)
        and _equal(kept.up, up)
    ):
        return kept.norms
    norms = _row_norms(module, name)
    _kept[module][name] = _Kept(
        down.detach().clone(), up.detach().clone(), scaling, _weight_of(module), norms
    )
    return norms


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def _weight_of(module: Linear) -> tuple[tuple[ReferenceType[nn.Parameter], int], ...]:
    """The parameters of the linear with their versions; offloading changes neither."""
    return tuple((ref(p), _version(p)) for p in module.get_base_layer().parameters())


def _is_weight(kept: tuple[tuple[ReferenceType[nn.Parameter], int], ...], module: Linear) -> bool:
    """Whether the linear has these parameters still, and none was written to."""
    now: list[nn.Parameter] = [*module.get_base_layer().parameters()]
    # not `==`: two references compare the tensors themselves while both are alive
    return len(kept) == len(now) and all(
        reference() is p and version == _version(p)  # type: ignore[arg-type]
        for (reference, version), p in zip(kept, now, strict=True)
    )


def _version(p: nn.Parameter) -> int:
    return 0 if p.is_inference() else p._version


@torch.no_grad()
def _row_norms(module: Linear, name: str) -> Tensor:
    """``||W + s B A||`` of every row: float32 (N,).

    Raises:
        InputError: the linear is offloaded by itself, as in sequential offloading.
    """
    base = module.get_base_layer()
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    if down.is_meta:  # the values follow from a file
        return torch.empty(len(up), device="meta")
    if base.weight.is_meta:
        raise InputError(_OFFLOADED.format(repr(name)))
    w = base.dequantize(torch.float32) if isinstance(base, QuantLinear) else base.weight.float()
    delta = (up.float() @ down.float()) * module.scaling[name]  # (N, K)
    return torch.linalg.vector_norm(w.to(delta.device) + delta, dim=1)
