# SPDX-License-Identifier: Apache-2.0
"""LoKr and LoHa on quantized linears, computed from their factors.

peft's layers build the change of the weight, (N, K), in every call, with the shape of a ``weight``
that is packed here. These apply the factors to the input: ``kron(w1, w2) x`` is a product with
``w2`` and one with ``w1`` (Yeh et al. 2024, "Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation", section 3), and the product of two matrices of rank R, element
by element, has rank R^2 (Hyeon-Woo et al. 2022, "FedPara", proposition 1).

This module needs peft.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.loha.layer import Linear as PeftLoha
from peft.tuners.loha.model import LoHaModel
from peft.tuners.lokr.layer import Linear as PeftLokr
from peft.tuners.lokr.model import LoKrModel
from peft.tuners.lycoris_utils import LycorisLayer
from torch import Tensor, nn

from dtq.integrations.fuse import Fusible, check_rank, kronecker_factors
from dtq.nn.linear import QuantLinear


class _SideBranch(Fusible, LycorisLayer):  # type: ignore[misc]
    """What LoKr and LoHa share on a quantized linear."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        self.start(adapter_name)

    @abstractmethod
    def change(self, name: str, x: Tensor) -> Tensor:
        """What an adapter adds to the output, for ``x`` (..., K) in the dtype of the factors."""

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        """The change of the weight (N, K).

        Args:
            adapter_name: name of the adapter.
            apply_rank_dropout: whether to set rows to zero at random, as in training.
        """
        delta = self.dense(adapter_name)
        return delta * self._row_mask(adapter_name, delta)[:, None] if apply_rank_dropout else delta

    @abstractmethod
    def dense(self, name: str) -> Tensor:
        """The change of the weight (N, K), without dropout."""

    def _get_delta_activations(
        self, adapter_name: str, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        # the factors have the dtype of the first of them that the adapter has
        kept = (getattr(self, kind) for kind in self.adapter_layer_names)
        dtype = next(each[adapter_name].dtype for each in kept if adapter_name in each)
        y = self.change(adapter_name, self._cast_input_dtype(input, dtype))
        if self.training and self.rank_dropout[adapter_name]:
            y = y * self._row_mask(adapter_name, y)
        return y

    def _row_mask(self, name: str, like: Tensor) -> Tensor:
        """Factors (N,) that leave out rows of the change at random, as peft does."""
        keep = (torch.rand(self.out_features) > self.rank_dropout[name]).to(like)
        return keep / keep.mean() if self.rank_dropout_scale.get(name, True) else keep

    def _adapters(self) -> set[str]:
        return {*self._available_adapters}


class LokrLinear(_SideBranch, PeftLokr):  # type: ignore[misc]
    """peft's LoKr layer for a linear, on a quantized one.

    Args:
        base_layer: the quantized linear.
        adapter_name: name of the adapter.
        *args: of peft's layer.
        **kwargs: of peft's layer.

    Raises:
        InputError: the linear replaced a convolution.
    """

    def _factor(self, which: str, name: str) -> tuple[Tensor, Tensor] | Tensor:
        whole = getattr(self, f"lokr_{which}")
        if name in whole:
            return whole[name]  # type: ignore[no-any-return]
        return tuple(getattr(self, f"lokr_{which}_{side}")[name] for side in "ab")  # type: ignore[return-value]

    def _dense_factor(self, which: str, name: str) -> Tensor:
        w = self._factor(which, name)
        return w if isinstance(w, Tensor) else w[0] @ w[1]

    def dense(self, name: str) -> Tensor:
        """``kron(w1, w2)``, scaled: (N, K)."""
        w1, w2 = (self._dense_factor(which, name) for which in ("w1", "w2"))
        return torch.kron(w1, w2.contiguous()) * self.scaling[name]

    def change(self, name: str, x: Tensor) -> Tensor:
        """``x kron(w1, w2)^T``, scaled, from the factors."""
        w1, w2 = self._dense_factor("w1", name), self._factor("w2", name)
        x = x.unflatten(-1, (w1.shape[1], -1))  # (..., B, D)
        for factor in (w2,) if isinstance(w2, Tensor) else reversed(w2):
            x = F.linear(x, factor)  # (..., B, C) after the last
        # not w1 @ x: how torch computes that depends on requires_grad, and so do the last bits
        return F.linear(x.mT, w1).mT.flatten(-2) * self.scaling[name]  # (..., A C)

    def low_rank(self, name: str) -> tuple[Tensor, Tensor]:
        """Factors of ``kron(w1, w2)``: (R, K) and (N, R).

        Raises:
            InputError: they are as large as the float weight.
        """
        w1, w2 = self._factor("w1", name), self._factor("w2", name)
        down, up = kronecker_factors(w1, w2)
        return check_rank(name, "LoKr", down.detach(), up.detach() * self.scaling[name])


class LohaLinear(_SideBranch, PeftLoha):  # type: ignore[misc]
    """peft's LoHa layer for a linear, on a quantized one.

    Args:
        base_layer: the quantized linear.
        adapter_name: name of the adapter.
        *args: of peft's layer.
        **kwargs: of peft's layer.

    Raises:
        InputError: the linear replaced a convolution.
    """

    def create_adapter_parameters(self, adapter_name: str, r: int, shape: tuple[int, ...]) -> None:
        """Create the factors.

        Args:
            adapter_name: name of the adapter.
            r: their rank.
            shape: not used: peft gives that of the packed weight.
        """
        super().create_adapter_parameters(adapter_name, r, (self.out_features, self.in_features))

    def _factors(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(getattr(self, f"hada_w{w}")[name] for w in ("1_a", "1_b", "2_a", "2_b"))  # type: ignore[return-value]

    def dense(self, name: str) -> Tensor:
        """``(w1_a w1_b) * (w2_a w2_b)``, scaled: (N, K)."""
        up1, down1, up2, down2 = self._factors(name)
        return (up1 @ down1) * (up2 @ down2) * self.scaling[name]

    def _product(self, name: str) -> tuple[Tensor, Tensor]:
        """Factors (R^2, K) and (N, R^2) whose product is the elementwise product, not scaled."""
        up1, down1, up2, down2 = self._factors(name)
        down = (down1[:, None] * down2).flatten(0, 1)
        up = (up1[:, :, None] * up2[:, None]).flatten(1)
        return down, up

    def change(self, name: str, x: Tensor) -> Tensor:
        """The change of the output, from whichever of the factors and the matrix is smaller."""
        up1, down1, up2, _ = self._factors(name)
        rows, columns = len(up1), down1.shape[1]
        if up1.shape[1] * up2.shape[1] * (rows + columns) >= rows * columns:
            return F.linear(x, self.dense(name))
        down, up = self._product(name)
        return F.linear(F.linear(x, down), up) * self.scaling[name]

    def low_rank(self, name: str) -> tuple[Tensor, Tensor]:
        """Factors of the elementwise product: (R^2, K) and (N, R^2).

        Raises:
            InputError: they are as large as the float weight.
        """
        down, up = self._product(name)
        return check_rank(name, "LoHa", down.detach(), up.detach() * self.scaling[name])


def register() -> None:
    """Make peft put these layers on quantized linears."""
    for model, layer in ((LoKrModel, LokrLinear), (LoHaModel, LohaLinear)):
        # the first row that fits is taken, and a quantized linear is an nn.Linear
        others = {kind: made for kind, made in model.layers_mapping.items() if kind != QuantLinear}
        model.layers_mapping = {QuantLinear: layer, **others}
