# SPDX-License-Identifier: Apache-2.0
"""Integer formats: symmetric or asymmetric, per row or per group, and double quantization.

Definitions, for a row or group with the range [lo, hi] and b bits (docs/formats.md shows the bits):

- symmetric: ``scale = clip * max|w| / (2^(b-1) - 1)``, ``w = q * scale``;
- asymmetric: ``scale = clip * (hi - lo) / (2^b - 1)``, ``w = (q - zero_point) * scale`` with
  lo <= 0 <= hi, so that zero is always representable;
- two-level, ``2l`` in names (double quantization; QServe, 2405.04532, sec. 4.1, "progressive group
  quantization"): a float scale per row maps the weight to [-119, 119] (at 3 bits [-112, 112]), and
  ``w8 = (q - zero_point) * scale2`` with integers per group quantizes that. ``w8`` is an int8
  matrix, so the product with int8 activations is exact integer arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtq.formats.base import Clip, Format, PackedTensors, QParams, TensorSpec
from dtq.formats.groups import dequantize, expand_groups, in_groups, scale_dtype
from dtq.formats.packing import pack_bits, unpack_bits

_TINY = 1e-30  # scale of an all-zero group: any positive number represents its zeros exactly


@dataclass(frozen=True)
class Int(Format):
    """``bits``-bit integers with one scale per row, or per group of columns.

    Symmetric integers below 8 bits are stored unsigned, raised by 2^(bits - 1); asymmetric 8-bit
    ones are stored signed, lowered by 128 like their zero points.

    Attributes:
        name: key of ``FORMATS``.
        bits: bits of a weight.
        group: columns per scale; None: one float32 scale per row. Scales of groups are bfloat16.
        asymmetric: whether rows or groups have a zero point, too.
        narrow: leave out the lowest integer of symmetric ones, so that a value may be negated.
    """

    name: str
    bits: int
    group: int | None = None
    asymmetric: bool = False
    narrow: bool = False

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Packed ``weight``, ``weight_scale``; asymmetric: int8 ``weight_zero_point``."""
        specs = self._packed_specs(shape, self.bits)
        if self.narrow:
            specs["weight"] = replace(specs["weight"], unsupported_reason=self._unsupported_weight)
        if self.asymmetric:
            check = self._unsupported_zero_point if self.bits < 8 else None
            zero_point_shape = specs["weight_scale"].shape
            specs["weight_zero_point"] = TensorSpec(zero_point_shape, torch.int8, check)
        return specs

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        grouped = in_groups(x, self.group)
        if not self.asymmetric:
            return {"weight_scale": self._stored_scale(clip * grouped.abs().amax(-1) / self._qmax)}
        low, high = _range_with_zero(grouped, clip)
        scale = self._stored_scale((high - low) / self._qmax)
        zero_point = torch.round(-low / scale.float()).clamp(0, self._qmax)
        return {"weight_scale": scale, "weight_zero_point": zero_point}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        """Nearest representable values, float32; see :meth:`Format.fake_quantize`."""
        q, scale, zero_point = self._quantize(x, qparams, cols)
        return (q - zero_point) * scale

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        """Packed integers of ``x`` (N, K), scales, and zero points as int8."""
        q, _, _ = self._quantize(x, qparams)
        if self.bits == 8:
            weight = (q - 128 if self.asymmetric else q).to(torch.int8)
        else:
            weight = pack_bits(q if self.asymmetric else q + self._offset, self.bits)
        tensors = {"weight": weight, "weight_scale": qparams["weight_scale"]}
        if self.asymmetric:
            zero_point = qparams["weight_zero_point"] - (128 if self.bits == 8 else 0)
            tensors["weight_zero_point"] = zero_point.to(torch.int8)
        return tensors

    def unpack(self, tensors: PackedTensors) -> Tensor:
        """The float32 matrix (N, K) that packed tensors represent."""
        weight = tensors["weight"]
        q = weight if self.bits == 8 else unpack_bits(weight, self.bits)
        offset = self._offset if self.bits < 8 else None
        return dequantize(q, tensors["weight_scale"], tensors.get("weight_zero_point", offset))

    def _unsupported_weight(self, weight: Tensor) -> str | None:
        wrong = int((unpack_bits(weight, self.bits) == 0).sum())
        return f"{wrong} values below {self._qmin}" if wrong else None

    def _unsupported_zero_point(self, weight_zero_point: Tensor) -> str | None:
        wrong = int(((weight_zero_point < 0) | (weight_zero_point > self._qmax)).sum())
        return f"{wrong} zero points outside 0 to {self._qmax}" if wrong else None

    @property
    def _qmax(self) -> int:
        return 2**self.bits - 1 if self.asymmetric else 2 ** (self.bits - 1) - 1

    @property
    def _qmin(self) -> int:
        if self.asymmetric:
            return 0
        # not -128: kernels may negate a value
        return -self._qmax if self.bits == 8 or self.narrow else -self._offset

    @property
    def _offset(self) -> int:
        return 2 ** (self.bits - 1)

    def _stored_scale(self, scale: Tensor) -> Tensor:
        # rounded first: weights are quantized with the scale that the file has
        return scale.clamp(min=_TINY).to(scale_dtype(self.group))

    def _quantize(
        self, x: Tensor, qparams: QParams, cols: slice | None = None
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Integers as float (N, columns); scale and zero point of each column."""
        scale = expand_groups(qparams["weight_scale"], x.shape[1], self.group, cols).float()
        zero_point: Tensor | float = 0.0
        if self.asymmetric:
            zero_point = expand_groups(qparams["weight_zero_point"], x.shape[1], self.group, cols)
        q = (torch.round(x.float() / scale) + zero_point).clamp(self._qmin, self._qmax)
        return q, scale, zero_point


@dataclass(frozen=True)
class TwoLevelInt(Format):
    """3- or 4-bit integers that expand exactly to int8: a float scale per row, a byte per group.

    That byte (``weight_scale_2``) has the zero point in its low ``bits`` bits and ``scale2 - 1`` in
    the others: 4 bits each at 4 bits, 3 and 5 at 3 bits. It costs 8 / group bits per weight.

    Attributes:
        name: key of ``FORMATS``.
        group: columns per byte.
        bits: 3 or 4.
    """

    name: str
    group: int
    bits: int = 4

    @property
    def limit(self) -> int:
        """Largest first-level magnitude. Rounded zero points and scales then stay within int8.

        scale2 fits its bits, too: ceil(238 / 15) = 16 at 4 bits, 224 / 7 = 32 at 3.
        """
        return 119 if self.bits == 4 else 112

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Packed ``weight``, float32 ``weight_scale`` (N, 1), ``weight_scale_2`` (N, groups)."""
        specs = self._packed_specs(shape, self.bits, torch.int8)
        specs["weight_scale_2"] = replace(
            specs["weight_scale"], unsupported_reason=self._unsupported_bytes
        )
        return {**specs, "weight_scale": TensorSpec((shape[0], 1), torch.float32)}

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        if outer is None:
            scale = (x.abs().amax(1, keepdim=True) / self.limit).clamp(min=_TINY)
        else:
            scale = outer["weight_scale"]
        low, high = _range_with_zero(in_groups(x / scale, self.group), clip)
        low, high = low.clamp(min=-self.limit), high.clamp(max=self.limit)
        # rounded up: the largest integer must reach the end of the range that clip asked for
        scale2 = torch.ceil((high - low) / self._qmax - 1e-4).clamp(1, 2 ** (8 - self.bits))
        zero = torch.round(-low / scale2).clamp(0, self._qmax)
        # (q - zero) * scale2 must stay in int8 at both ends; a corner can miss by a few units
        zero = torch.minimum(zero, torch.floor(128 / scale2))
        zero = torch.maximum(zero, self._qmax - torch.floor(127 / scale2))
        return {"weight_scale": scale, "scale2": scale2, "zero": zero}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        """Nearest representable values, float32; see :meth:`Format.fake_quantize`."""
        q, scale2, zero = self._quantize(x, qparams, cols)
        return (q - zero) * scale2 * qparams["weight_scale"]

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        """Packed integers of ``x`` (N, K), the row scales, the group bytes."""
        q, _, _ = self._quantize(x, qparams)
        scale2 = (qparams["scale2"] - 1).to(torch.uint8)
        byte = qparams["zero"].to(torch.uint8) | (scale2 << self.bits)
        return {
            "weight": pack_bits(q, self.bits),
            "weight_scale": qparams["weight_scale"],
            "weight_scale_2": byte.view(torch.int8),
        }

    def unpack(self, tensors: PackedTensors) -> Tensor:
        """The float32 matrix (N, K) that packed tensors represent."""
        expanded = self.expand(tensors["weight"], tensors["weight_scale_2"], self.bits)
        return expanded.float() * tensors["weight_scale"].float()

    def _unsupported_bytes(self, weight_scale_2: Tensor) -> str | None:
        byte = weight_scale_2.view(torch.uint8).to(torch.int16)
        scale2, zero = (byte >> self.bits) + 1, byte & self._qmax
        wrong = int(((scale2 * zero > 128) | (scale2 * (self._qmax - zero) > 127)).sum())
        return f"{wrong} group bytes whose weights leave int8" if wrong else None

    @staticmethod
    def expand(weight: Tensor, weight_scale_2: Tensor, bits: int = 4) -> Tensor:
        """Exact int8 (N, K) of packed integers (N, K * bits / 8) and group bytes (N, groups)."""
        byte = weight_scale_2.view(torch.uint8)
        scale2, zero = (byte >> bits).to(torch.int16) + 1, (byte & (2**bits - 1)).to(torch.int16)
        q = unpack_bits(weight, bits).to(torch.int16).unflatten(1, (byte.shape[1], -1))
        return ((q - zero.unsqueeze(-1)) * scale2.unsqueeze(-1)).flatten(1).to(torch.int8)

    @property
    def _qmax(self) -> int:
        return 2**self.bits - 1

    def _quantize(
        self, x: Tensor, qparams: QParams, cols: slice | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Integers as float (N, columns); second-level scale and zero point of each column."""
        scale2 = expand_groups(qparams["scale2"], x.shape[1], self.group, cols)
        zero = expand_groups(qparams["zero"], x.shape[1], self.group, cols)
        u = x.float() / qparams["weight_scale"] / scale2
        return (torch.round(u) + zero).clamp(0, self._qmax), scale2, zero


def _range_with_zero(grouped: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    low = (clip * grouped.amin(-1)).clamp(max=0)
    high = (clip * grouped.amax(-1)).clamp(min=0)
    return low, high
