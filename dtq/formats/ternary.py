# SPDX-License-Identifier: Apache-2.0
"""Ternary weights: ``alpha * {-1, 0, 1}``.

TerDiT (2405.14854) trains for them. After training they are a rough approximation, rounded here
with the alpha of the lowest squared error (TWN, 1605.04711, sec. 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.formats.base import Clip, CodebookFormat, PackedTensors, QParams, TensorSpec
from dtq.formats.groups import broadcast_weights, divide, in_groups, num_groups, scale_dtype
from dtq.formats.packing import pack_bits, pack_trits, unpack_bits, unpack_trits


@dataclass(frozen=True)
class Ternary(CodebookFormat):
    """Codes 0, 1, 2 for -1, 0, 1, and a scale alpha per row or group.

    Attributes:
        name: key of ``FORMATS``.
        group: columns per scale; None: one float32 scale per row. Scales of groups are bfloat16.
        trits: pack five codes per byte in base 3, 1.6 bits per weight, instead of four. The columns
            beyond the last multiple of five get a byte each (``weight_tail``).
    """

    name: str
    group: int | None = None
    trits: bool = False

    data_dependent = True
    bits = 2

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Packed ``weight``, ``weight_scale``; with trits maybe ``weight_tail`` (N, K % 5)."""
        if not self.trits:
            return self._packed_specs(shape, 2)
        rows, columns = shape
        scale_shape = rows, num_groups(self.name, columns, self.group)
        specs = {
            "weight": TensorSpec((rows, columns // 5), torch.int8),
            "weight_scale": TensorSpec(scale_shape, scale_dtype(self.group)),
        }
        if columns % 5:
            specs["weight_tail"] = TensorSpec((rows, columns % 5), torch.int8, _unsupported_codes)
        return specs

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        """The optimal alpha: the m largest magnitudes become alpha, which is their weighted mean.

        Compared with all zeros that saves an error of ``(sum w|x|)^2 / sum w``; one sort gives the
        saving for every m.
        """
        magnitude, perm = in_groups(x, self.group).abs().sort(-1, descending=True)
        weight = in_groups(broadcast_weights(x, weights), self.group).expand_as(magnitude)
        mass = weight.gather(-1, perm)
        total, mass = (mass * magnitude).cumsum(-1), mass.cumsum(-1)
        mean = divide(total, mass)
        best = (mean * total).argmax(-1, keepdim=True)
        return {"weight_scale": mean.gather(-1, best).squeeze(-1).to(scale_dtype(self.group))}

    def pack_codes(self, codes: Tensor, alpha: Tensor | float) -> PackedTensors:
        """Packed tensors of trained ternary weights, for checkpoints that come with them.

        Args:
            codes: int8 (N, K) in {-1, 0, 1}.
            alpha: scale of the matrix, of its rows (N, 1) or of groups (N, groups).

        Returns:
            The packed tensors, alpha rounded to the dtype that is stored.
        """
        groups = num_groups(self.name, codes.shape[1], self.group)
        scale = torch.as_tensor(alpha, dtype=torch.float32).expand(len(codes), groups)
        return {
            **self._pack_codes((codes + 1).to(torch.uint8)),
            "weight_scale": scale.to(scale_dtype(self.group)).contiguous(),
        }

    def _round(self, u: Tensor, qparams: QParams) -> Tensor:
        return torch.round(u).clamp(-1, 1)

    def _encode(self, u: Tensor, qparams: QParams) -> Tensor:
        return (self._round(u, qparams) + 1).to(torch.uint8)

    def _decode(self, codes: Tensor, qparams: QParams) -> Tensor:
        return codes.float() - 1

    def _pack_codes(self, codes: Tensor) -> PackedTensors:
        if not self.trits:
            return {"weight": pack_bits(codes, 2)}
        whole = codes.shape[1] // 5 * 5
        tensors = {"weight": pack_trits(codes[:, :whole])}
        if whole < codes.shape[1]:
            tensors["weight_tail"] = codes[:, whole:].contiguous().view(torch.int8)
        return tensors

    def _unpack_codes(self, tensors: PackedTensors) -> Tensor:
        if not self.trits:
            return unpack_bits(tensors["weight"], 2)
        codes = unpack_trits(tensors["weight"])
        if "weight_tail" not in tensors:
            return codes
        return torch.cat([codes, tensors["weight_tail"].view(torch.uint8)], 1)


def _unsupported_codes(weight_tail: Tensor) -> str | None:
    wrong = int((weight_tail.view(torch.uint8) > 2).sum())
    return f"{wrong} ternary codes other than 0, 1 and 2" if wrong else None
