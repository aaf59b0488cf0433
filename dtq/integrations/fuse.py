# SPDX-License-Identifier: Apache-2.0
"""Fusing adapters into the low-rank branch of a quantized linear, and taking them out again.

The factors are appended to those of the branch, in bfloat16 as in a checkpoint. The packed weight
does not change, unfusing restores every bit, and a fused model saves and loads like any other.

This module needs peft.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.nn.linear import QuantLinear

CONVOLUTION = (
    "quantized convolutions take no adapters; exclude them from quantization: "
    "modules_to_not_convert, or exclude: in the recipe"
)
"""What is wrong with an adapter for a quantized linear in place of a convolution."""


TABLE = "quantized tables of embeddings take no adapters; quantize with embeddings=keep"
"""What is wrong with an adapter for a table, or for a head with the same weight."""


class Fusible(BaseTunerLayer):  # type: ignore[misc]
    """Part of a layer of peft on a quantized linear: a merge that does not change the weight.

    Attributes:
        fused: adapter to its range of ranks in the branch, and the bias from before.
    """

    fused: dict[str, tuple[int, int, nn.Parameter | None]]

    @abstractmethod
    def low_rank(self, name: str) -> tuple[Tensor, Tensor]:
        """Factors (R, K) and (N, R) whose product is the change of the weight.

        Raises:
            InputError: it has none, or they are as large as the float weight.
        """

    def fused_bias(self, name: str, base: QuantLinear) -> nn.Parameter | None:
        """The bias of the linear with that of an adapter added; without one, the same bias."""
        return base.bias

    def start(self, adapter_name: str) -> None:
        """Begin without fused adapters, in the mode of the linear, not in training.

        Raises:
            InputError: the linear replaced a convolution.
        """
        self.fused = {}
        base = self.get_base_layer()
        self.train(base.training)  # type: ignore[attr-defined]
        if base.spatial:
            raise InputError(f"adapter {adapter_name!r}: {CONVOLUTION}")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuse adapters into the low-rank branch of the quantized linear.

        Args:
            safe_merge: whether to check that the factors are finite.
            adapter_names: None for the active adapters.

        Raises:
            InputError: an adapter cannot be fused, or a tensor is not finite.
        """
        base: Any = self.get_base_layer()
        if not isinstance(base, QuantLinear):  # the model was dequantized
            super().merge(safe_merge, adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self._adapters():
                continue
            factors = self.low_rank(name)
            bias = self.fused_bias(name, base)
            values = factors if bias is None else (*factors, bias)
            if safe_merge and not all(value.isfinite().all() for value in values):
                raise InputError(f"adapter {name!r} has numbers that are not finite")
            self.fused[name] = *base.add_rank(*factors), base.bias
            base.bias = bias  # type: ignore[assignment]
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove fused adapters from the branch, the last one first; restores every bit."""
        base: Any = self.get_base_layer()
        if not isinstance(base, QuantLinear):
            super().unmerge()
            return
        while self.merged_adapters:
            first, end, bias = self.fused.pop(self.merged_adapters.pop())
            base.remove_rank(first, end)
            if bias is not None:  # the model may have been cast or moved since
                bias = nn.Parameter(bias.to(base.bias), bias.requires_grad)
            base.bias = bias  # type: ignore[assignment]

    def _adapters(self) -> set[str]:
        """Names of the adapters that this layer has."""
        return {*getattr(self, self.adapter_layer_names[0])}


def kronecker_factors(
    w1: tuple[Tensor, Tensor] | Tensor, w2: tuple[Tensor, Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of the smallest rank for ``kron(w1, w2)``, from the mixed-product property.

    ``kron(w1, c d) = kron(w1, c) kron(1, d) = kron(1, c) kron(w1, d)``.

    Args:
        w1: (A, B), or two factors of it.
        w2: (C, D), or two factors of it.

    Returns:
        (R, B D) and (A C, R).
    """
    (a, b), (c, d) = (_as_factors(w) for w in (w1, w2))
    return torch.kron(b, d), torch.kron(a, c)


def _as_factors(w: tuple[Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """``w``, or its product, as two factors; one is the identity if that has the smaller rank."""
    whole = w if isinstance(w, Tensor) else w[0] @ w[1]
    rows, columns = whole.shape
    if not isinstance(w, Tensor) and w[0].shape[1] < min(rows, columns):
        return w
    eye = torch.eye(min(rows, columns), device=whole.device, dtype=whole.dtype)
    return (eye, whole) if rows <= columns else (whole, eye)


def check_rank(name: str, kind: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The factors, if they are smaller than the weight.

    Args:
        name: of the adapter.
        kind: of the adapter, for the error.
        down: (R, K).
        up: (N, R).

    Returns:
        ``down`` and ``up``.

    Raises:
        InputError: they are not.
    """
    (rank, columns), rows = down.shape, len(up)
    if rank * (rows + columns) >= rows * columns:
        raise InputError(
            f"adapter {name!r} is {kind} of rank {rank} on a linear of {columns} to {rows}: fused, "
            f"it would be larger than the float weight. Keep it loaded, or merge it into the float "
            f"model and quantize that"
        )
    return down, up
