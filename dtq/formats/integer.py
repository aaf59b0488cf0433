# SPDX-License-Identifier: Apache-2.0
"""Integer grids: symmetric or not, per row or per group, and the two-level form.

Definitions (docs/formats.md has the bit pictures), for a group with range [lo, hi]:

- symmetric: ``scale = clip * max|w| / (2^(b-1) - 1)``, ``w = code * scale``;
- asymmetric: ``scale = clip * (hi - lo) / (2^b - 1)``, ``w = (code - zero) * scale`` with
  lo <= 0 <= hi, so that zero is always representable;
- two-level (QServe, 2405.04532, sec. 4.1, "progressive group quantization"): a float scale per
  row to the grid [-119, 119] (at 3 bits [-112, 112]), inside it ``w8 = (code - zero) * scale2``
  with integers per group. ``w8`` is an int8 matrix, so the product with int8 activations is exact
  integer arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.formats.base import (
    PackedTensors,
    QParams,
    TensorSpec,
    expand_groups,
    groups_of,
    in_groups,
    scale_dtype,
    scaled,
)
from dtq.formats.packing import pack_bits, packed_width, unpack_bits

_TINY = 1e-30  # scale of an all-zero group: any positive number represents its zeros exactly


@dataclass(frozen=True)
class Int:
    """``bits``-bit integers with one float scale per row, or per ``group`` columns of a row.

    Row scales are float32, group scales bfloat16.
    """

    name: str
    bits: int
    group: int | None = None
    asymmetric: bool = False

    vector = 1
    data_dependent = False

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = groups_of(self.name, columns, self.group)
        parts = {
            "weight": TensorSpec((rows, packed_width(self.name, columns, self.bits)), torch.int8),
            "weight_scale": TensorSpec((rows, groups), scale_dtype(self.group)),
        }
        if self.asymmetric:
            refuses = self._refuses if self.bits < 8 else None
            parts["weight_zero_point"] = TensorSpec((rows, groups), torch.int8, refuses)
        return parts

    def compute_qparams(
        self,
        x: Tensor,
        column_weights: Tensor | None = None,
        *,
        clip: Tensor | float = 1.0,
        outer: QParams | None = None,
    ) -> QParams:
        if outer is not None and self.group is None:
            return outer
        grouped = in_groups(x.float(), self.group)
        if not self.asymmetric:
            scale = clip * grouped.abs().amax(-1) / (2 ** (self.bits - 1) - 1)
            return {"weight_scale": self._stored(scale)}
        low, high = _range_with_zero(grouped, clip)
        scale = self._stored((high - low) / (2**self.bits - 1))
        zero = torch.round(-low / scale.float()).clamp(0, 2**self.bits - 1)
        return {"weight_scale": scale, "weight_zero_point": zero}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        scale, zero = self._per_column(x.shape[1], qparams, cols)
        return (self._codes(x, scale, zero) - zero) * scale

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        scale, zero = self._per_column(x.shape[1], qparams, None)
        codes = self._codes(x, scale, zero)
        if self.bits == 8:
            weight = (codes - 128 if self.asymmetric else codes).to(torch.int8)
        else:
            weight = pack_bits(codes if self.asymmetric else codes + self._offset, self.bits)
        parts = {"weight": weight, "weight_scale": qparams["weight_scale"]}
        if self.asymmetric:
            stored = qparams["weight_zero_point"] - (128 if self.bits == 8 else 0)
            parts["weight_zero_point"] = stored.to(torch.int8)
        return parts

    def unpack(self, tensors: PackedTensors) -> Tensor:
        weight = tensors["weight"]
        codes = weight if self.bits == 8 else unpack_bits(weight, self.bits)
        offset = self._offset if self.bits < 8 else None
        return scaled(codes, tensors["weight_scale"], tensors.get("weight_zero_point", offset))

    def _refuses(self, weight_zero_point: Tensor) -> str | None:
        wrong = int(((weight_zero_point < 0) | (weight_zero_point >= 2**self.bits)).sum())
        return f"{wrong} zero points outside 0 to {2**self.bits - 1}" if wrong else None

    @property
    def _offset(self) -> int:
        # symmetric codes below 8 bits are stored unsigned
        return 2 ** (self.bits - 1)

    def _stored(self, scale: Tensor) -> Tensor:
        # round first: the file keeps this dtype, so the weight must be w_q with what it keeps
        return scale.clamp(min=_TINY).to(scale_dtype(self.group))

    def _per_column(
        self, columns: int, qparams: QParams, cols: slice | None
    ) -> tuple[Tensor, Tensor | float]:
        scale = expand_groups(qparams["weight_scale"], columns, self.group, cols).float()
        if not self.asymmetric:
            return scale, 0.0
        return scale, expand_groups(qparams["weight_zero_point"], columns, self.group, cols)

    def _codes(self, x: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
        low, high = (0, 2**self.bits - 1) if self.asymmetric else _symmetric_range(self.bits)
        return (torch.round(x.float() / scale) + zero).clamp(low, high)


@dataclass(frozen=True)
class TwoLevelInt:
    """3- or 4-bit codes that expand exactly to int8: a float scale per row, a byte per group.

    That byte (``weight_scale_2``) holds the zero in its low ``bits`` bits and ``scale2 - 1`` in the
    others: 4 bits each at 4 bits, 3 and 5 at 3 bits. It costs 8/group bits per weight.
    """

    name: str
    group: int
    bits: int = 4

    vector = 1
    data_dependent = False

    @property
    def limit(self) -> int:
        """Largest level-1 magnitude; rounding of zero and scale2 then stays within int8.

        scale2 fits its bits too: ceil(238 / 15) = 16 at 4 bits, 224 / 7 = 32 at 3.
        """
        return 119 if self.bits == 4 else 112

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = groups_of(self.name, columns, self.group)
        return {
            "weight": TensorSpec((rows, packed_width(self.name, columns, self.bits)), torch.int8),
            "weight_scale": TensorSpec((rows, 1), torch.float32),
            "weight_scale_2": TensorSpec((rows, groups), torch.int8, self._refuses),
        }

    def compute_qparams(
        self,
        x: Tensor,
        column_weights: Tensor | None = None,
        *,
        clip: Tensor | float = 1.0,
        outer: QParams | None = None,
    ) -> QParams:
        x = x.float()
        if outer is None:
            scale = (x.abs().amax(1, keepdim=True) / self.limit).clamp(min=_TINY)
        else:
            scale = outer["weight_scale"]
        low, high = _range_with_zero(in_groups(x / scale, self.group), clip)
        low, high = low.clamp(min=-self.limit), high.clamp(max=self.limit)
        # up, not to nearest: the last code must reach the end of the range that clip asked for
        scale2 = torch.ceil((high - low) / self._top - 1e-4).clamp(1, 2 ** (8 - self.bits))
        zero = torch.round(-low / scale2).clamp(0, self._top)
        # (code - zero) * scale2 must stay in int8 at both ends; a corner can miss by a few units
        zero = torch.minimum(zero, torch.floor(128 / scale2))
        zero = torch.maximum(zero, self._top - torch.floor(127 / scale2))
        return {"weight_scale": scale, "scale2": scale2, "zero": zero}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        codes, scale2, zero = self._codes(x, qparams, cols)
        return (codes - zero) * scale2 * qparams["weight_scale"]

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        codes, _, _ = self._codes(x, qparams, None)
        scale2 = (qparams["scale2"] - 1).to(torch.uint8)
        byte = qparams["zero"].to(torch.uint8) | (scale2 << self.bits)
        return {
            "weight": pack_bits(codes, self.bits),
            "weight_scale": qparams["weight_scale"],
            "weight_scale_2": byte.view(torch.int8),
        }

    def unpack(self, tensors: PackedTensors) -> Tensor:
        expanded = self.expand(tensors["weight"], tensors["weight_scale_2"], self.bits)
        return expanded.float() * tensors["weight_scale"].float()

    def _refuses(self, weight_scale_2: Tensor) -> str | None:
        byte = weight_scale_2.view(torch.uint8).to(torch.int16)
        scale2, zero = (byte >> self.bits) + 1, byte & self._top
        wrong = int(((scale2 * zero > 128) | (scale2 * (self._top - zero) > 127)).sum())
        return f"{wrong} group bytes whose weights leave int8" if wrong else None

    @staticmethod
    def expand(weight: Tensor, weight_scale_2: Tensor, bits: int = 4) -> Tensor:
        """Exact int8 (N, K) of packed codes (N, K * bits / 8) and group bytes (N, groups)."""
        byte = weight_scale_2.view(torch.uint8)
        scale2, zero = (byte >> bits).to(torch.int16) + 1, (byte & (2**bits - 1)).to(torch.int16)
        codes = unpack_bits(weight, bits).to(torch.int16).unflatten(1, (byte.shape[1], -1))
        return ((codes - zero.unsqueeze(-1)) * scale2.unsqueeze(-1)).flatten(1).to(torch.int8)

    @property
    def _top(self) -> int:
        return 2**self.bits - 1

    def _codes(
        self, x: Tensor, qparams: QParams, cols: slice | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale2 = expand_groups(qparams["scale2"], x.shape[1], self.group, cols)
        zero = expand_groups(qparams["zero"], x.shape[1], self.group, cols)
        levels = x.float() / qparams["weight_scale"] / scale2
        return (torch.round(levels) + zero).clamp(0, self._top), scale2, zero


def _symmetric_range(bits: int) -> tuple[int, int]:
    # int8 leaves out -128: kernels may negate a code
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _range_with_zero(grouped: Tensor, clip: Tensor | float) -> tuple[Tensor, Tensor]:
    low = (clip * grouped.amin(-1)).clamp(max=0)
    high = (clip * grouped.amax(-1)).clamp(min=0)
    return low, high
