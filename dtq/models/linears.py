# SPDX-License-Identifier: Apache-2.0
"""Linears and convolutions as matrices (N, K), and the inputs of linears as rows (M, K)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Classes whose subclasses can be replaced: those that compute with ``_conv_forward``."""

_FORWARDS = tuple(kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear, or a convolution that is one (see :func:`is_pointwise`)."""
    return isinstance(module, nn.Linear) or is_pointwise(module)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a 1 x 1 convolution: stride 1, one group, no padding.

    A subclass with a ``forward`` of its own is none, because it may take more arguments.
    """
    return (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and not has_own_forward(module)
        and math.prod(module.kernel_size) == math.prod(module.stride) == module.groups == 1
        and not any(module.padding)
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether the class of a linear or convolution does not inherit the ``forward`` of torch."""
    return inspect.unwrap(type(module).forward) not in _FORWARDS


def linears_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linears and 1 x 1 convolutions by dotted name, in model order."""
    return ((name, module) for name, module in model.named_modules() if is_linear(module))


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate or diffusers have wrapped the forward: offloading, layerwise casting."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear or 1 x 1 convolution."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return module.out_channels, module.in_channels


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a float linear or 1 x 1 convolution as a matrix (N, K), float32."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().flatten(1)


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input that a call of a linear or convolution passes, by position or as ``input=``."""
    return args[0] if args else kwargs.get("input")


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a linear (..., K) or 1 x 1 convolution (B, K, ...) as rows (M, K)."""
    axes = len(getattr(module, "kernel_size", ()))
    last = x.movedim(-1 - axes, -1)
    return last.reshape(-1, last.shape[-1])


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a float convolution with a plain weight, which torch's forward reads."""
    plain = isinstance(module._parameters.get("weight"), nn.Parameter)
    return isinstance(module, CONVOLUTIONS) and plain and not reads_weight(module)


def reads_weight(module: nn.Module) -> bool:
    """Whether a linear or a convolution has a forward of its own that reads ``weight``.

    The weight of such a layer cannot be packed.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return has_own_forward(module) and code is not None and "weight" in code.co_names


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """The shape of the weight as a matrix.

    (O, I / groups * kernel) of a convolution, (N, K) of a linear, (N, D) of a table of embeddings.
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    assert isinstance(module, CONVOLUTIONS)
    columns = module.in_channels // module.groups * math.prod(module.kernel_size)
    return module.out_channels, columns
