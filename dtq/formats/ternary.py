# SPDX-License-Identifier: Apache-2.0
"""Ternary weights: ``alpha * {-1, 0, 1}``.

Trained for in TerDiT (2405.14854); after training they are a rough approximation, rounded here to
the alpha of least squared error (TWN, 1605.04711, sec. 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.formats.base import (
    PackedTensors,
    QParams,
    TensorSpec,
    broadcast_weights,
    divide,
    expand_groups,
    groups_of,
    in_groups,
    scale_dtype,
    scaled,
)
from dtq.formats.packing import pack_bits, pack_trits, packed_width, unpack_bits, unpack_trits


@dataclass(frozen=True)
class Ternary:
    """Codes 0, 1, 2 for -1, 0, 1; a float32 scale per row, or a bfloat16 one per group.

    Attributes:
        trits: five codes a byte in base 3, 1.6 bits, instead of four. Columns beyond the last
            multiple of five are kept one code a byte (``weight_tail``).
    """

    name: str
    group: int | None = None
    trits: bool = False

    vector = 1
    data_dependent = True

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        scale = TensorSpec(
            (rows, groups_of(self.name, columns, self.group)), scale_dtype(self.group)
        )
        if not self.trits:
            width = packed_width(self.name, columns, 2)
            return {"weight": TensorSpec((rows, width), torch.int8), "weight_scale": scale}
        parts = {"weight": TensorSpec((rows, columns // 5), torch.int8), "weight_scale": scale}
        if columns % 5:
            parts["weight_tail"] = TensorSpec((rows, columns % 5), torch.int8, _no_codes)
        return parts

    def compute_qparams(
        self,
        x: Tensor,
        column_weights: Tensor | None = None,
        *,
        clip: Tensor | float = 1.0,
        outer: QParams | None = None,
    ) -> QParams:
        """The best alpha, exactly: the m largest magnitudes become alpha, their weighted mean.

        That gains ``(sum w|x|)^2 / sum w`` over all zeros; one sort tries every m.
        """
        if outer is not None and self.group is None:
            return outer
        size, order = in_groups(x.float(), self.group).abs().sort(-1, descending=True)
        weight = in_groups(broadcast_weights(x, column_weights), self.group).expand_as(size)
        mass = weight.gather(-1, order)
        total, mass = (mass * size).cumsum(-1), mass.cumsum(-1)
        mean = divide(total, mass)
        best = (mean * total).argmax(-1, keepdim=True)
        return {"weight_scale": mean.gather(-1, best).squeeze(-1).to(scale_dtype(self.group))}

    def absmean(self, x: Tensor) -> QParams:
        """TerDiT's rule: codes ``clip(round(W / gamma))``, gamma = mean |W| of all."""
        return {"weight_scale": self._scales(x.float().abs().mean(), x.shape)}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        scale = expand_groups(qparams["weight_scale"], x.shape[1], self.group, cols).float()
        return self._codes(x, scale) * scale

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        scale = expand_groups(qparams["weight_scale"], x.shape[1], self.group, None).float()
        return {**self._stored(self._codes(x, scale).to(torch.int8)), **qparams}

    def parts_of(self, codes: Tensor, alpha: Tensor | float) -> PackedTensors:
        """The parts of trained codes, for checkpoints that come with them.

        Args:
            codes: int8 (N, K) in {-1, 0, 1}.
            alpha: scale of the matrix, or of its rows (N, 1), or of groups (N, groups).
        """
        return {**self._stored(codes), "weight_scale": self._scales(alpha, codes.shape)}

    def unpack(self, tensors: PackedTensors) -> Tensor:
        if self.trits:
            codes = unpack_trits(tensors["weight"])
            if "weight_tail" in tensors:
                codes = torch.cat([codes, tensors["weight_tail"].view(torch.uint8)], 1)
        else:
            codes = unpack_bits(tensors["weight"], 2)
        return scaled(codes, tensors["weight_scale"], 1)

    def _scales(self, alpha: Tensor | float, shape: torch.Size) -> Tensor:
        groups = groups_of(self.name, shape[1], self.group)
        alpha = torch.as_tensor(alpha, dtype=torch.float32)
        return alpha.expand(shape[0], groups).to(scale_dtype(self.group)).contiguous()

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.round(divide(x.float(), scale)).clamp(-1, 1)

    def _stored(self, codes: Tensor) -> PackedTensors:
        digits = (codes + 1).to(torch.uint8)
        if not self.trits:
            return {"weight": pack_bits(digits, 2)}
        whole = digits.shape[1] // 5 * 5
        parts = {"weight": pack_trits(digits[:, :whole])}
        if whole < digits.shape[1]:
            parts["weight_tail"] = digits[:, whole:].contiguous().view(torch.int8)
        return parts


def _no_codes(weight_tail: Tensor) -> str | None:
    wrong = int((weight_tail.view(torch.uint8) > 2).sum())
    return f"{wrong} ternary codes other than 0, 1 and 2" if wrong else None
