# SPDX-License-Identifier: Apache-2.0
"""``BASELINES``: other libraries on the same layers, for rows of the tables of models.

Each entry quantizes the given linears of a float model in place. All other layers, modulation
included, stay in float, which is an advantage of the other libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dtq.errors import InputError
from dtq.evaluate.optional_packages import need

_INT4: Any = torch.int4  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Baseline:
    """A method of another library.

    Attributes:
        about: one line in the words of the library.
        apply: ``(model, names of linears)``; quantizes them in place.
        bits: stored bits per weight of a quantized linear, with metadata, integers packed.
    """

    about: str
    apply: Callable[[nn.Module, Sequence[str]], None]
    bits: Callable[[nn.Module], float]


def _torchao(about: str, config: Callable[[Any], Any]) -> Baseline:
    """A baseline with a config made from ``torchao.quantization``."""

    def apply(model: nn.Module, names: Sequence[str]) -> None:
        api = need("torchao.quantization", "torchao")
        chosen = set(names)
        api.quantize_(model, config(api), filter_fn=lambda module, name: name in chosen)

    return Baseline(about, apply, _torchao_bits)


def _quanto(model: nn.Module, names: Sequence[str]) -> None:
    quanto = need("optimum.quanto", "optimum-quanto")
    quanto.quantize(model, weights=quanto.qint4, include=list(names))
    quanto.freeze(model)


def _nf4(model: nn.Module, names: Sequence[str]) -> None:
    bnb = need("bitsandbytes", "bitsandbytes")
    for name in names:
        old: Any = model.get_submodule(name)
        weight = old.weight.detach()
        form = {"compress_statistics": False, "quant_type": "nf4"}
        new = bnb.nn.Linear4bit(
            *weight.T.shape, bias=old.bias is not None, compute_dtype=weight.dtype, **form
        )
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **form)
        new.bias = old.bias
        model.set_submodule(name, new.to(weight.device))


def _nf4_bits(linear: nn.Module) -> float:
    state: Any = linear.weight.quant_state  # type: ignore[union-attr]
    return 4 + 8 * state.absmax.element_size() / float(state.blocksize)


def _torchao_bits(linear: nn.Module) -> float:
    weight: Any = linear.weight
    bits = 4 if "Intx" in type(weight).__name__ else 8
    return bits + _metadata_bits(weight, "scale", "zero_point")


def _quanto_bits(linear: nn.Module) -> float:
    # bfloat16 weights have scale and shift in one tensor
    return 4 + _metadata_bits(linear.weight, "_scale", "_shift", "_scale_shift")


def _metadata_bits(weight: Any, *names: str) -> float:
    """Bits per weight of the attributes of a quantized tensor that are tensors."""
    tensors = [t for name in names if isinstance(t := getattr(weight, name, None), torch.Tensor)]
    return 8 * sum(t.numel() * t.element_size() for t in tensors) / weight.numel()


BASELINES: dict[str, Baseline] = {
    "torchao-w4a8": _torchao(
        "torchao int8 dynamic activations, int4 weights g64",
        lambda api: api.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=_INT4, weight_granularity=api.PerGroup(64)
        ),
    ),
    "torchao-int4": _torchao(
        "torchao int4 weights g64, float activations",
        lambda api: api.IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=api.PerGroup(64)),
    ),
    "torchao-w8a8": _torchao(
        "torchao int8 dynamic activations, int8 weights",
        lambda api: api.Int8DynamicActivationInt8WeightConfig(),
    ),
    "quanto-int4": Baseline(
        "optimum-quanto qint4 weights, float activations", _quanto, _quanto_bits
    ),
    "bnb-nf4": Baseline("bitsandbytes NF4 weights g64, float activations", _nf4, _nf4_bits),
}


def find(name: str) -> Baseline:
    """Find a baseline by name.

    Raises:
        InputError: no such baseline.
    """
    if name not in BASELINES:
        raise InputError(f"unknown baseline {name!r}; there are {', '.join(BASELINES)}")
    return BASELINES[name]
