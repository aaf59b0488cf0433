# SPDX-License-Identifier: Apache-2.0
"""Integer grids: symmetric or not, per row or per group, and the two-level form.

Definitions (docs/formats.md has the bit pictures), for a group with range [lo, hi]:

- symmetric: ``scale = clip * max|w| / (2^(b-1) - 1)``, ``w = code * scale``;
- asymmetric: ``scale = clip * (hi - lo) / (2^b - 1)``, ``w = (code - zero) * scale`` with
  lo <= 0 <= hi, so that zero is always representable;
- two-level (QServe, 2405.04532, sec. 4.1, "progressive group quantization"): a float scale per
  row to the grid [-119, 119], inside it ``w8 = (code - zero) * scale2`` with integers per group.
  ``w8`` is an int8 matrix, so the product with int8 activations is exact integer arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.errors import InputError
from dtq.formats.base import Params, Parts, Spec, group_of, in_groups
from dtq.formats.bits import pack_nibbles, unpack_nibbles

_TINY = 1e-30  # scale of an all-zero group: any positive number represents its zeros exactly


@dataclass(frozen=True)
class Int:
    """``bits``-bit integers with one float scale per row, or per ``group`` columns of a row.

    Row scales are float32. Group scales are bfloat16: there are many of them, and unlike float16
    it has no smallest weight below which a scale becomes zero.
    """

    name: str
    bits: int
    group: int | None = None
    asymmetric: bool = False

    def layout(self, shape: tuple[int, int]) -> dict[str, Spec]:
        rows, columns = shape
        groups = _groups(self.name, columns, self.group)
        packed = columns if self.bits == 8 else _even(self.name, columns) // 2
        parts = {
            "weight": Spec((rows, packed), torch.int8),
            "weight_scale": Spec((rows, groups), self._scale_dtype),
        }
        if self.asymmetric:
            parts["weight_zero_point"] = Spec((rows, groups), torch.int8)
        return parts

    def fit(
        self,
        x: Tensor,
        importance: Tensor | None = None,
        *,
        clip: Tensor | float = 1.0,
        outer: Params | None = None,
    ) -> Params:
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

    def snap(self, x: Tensor, params: Params, cols: slice | None = None) -> Tensor:
        scale, zero = self._per_column(x.shape[1], params, cols, x.device)
        return (self._codes(x, scale, zero) - zero) * scale

    def pack(self, x: Tensor, params: Params) -> Parts:
        scale, zero = self._per_column(x.shape[1], params, None, x.device)
        codes = self._codes(x, scale, zero)
        if self.bits == 4:
            weight = pack_nibbles(codes if self.asymmetric else codes + 8)
        else:
            weight = (codes - 128 if self.asymmetric else codes).to(torch.int8)
        parts = {"weight": weight, "weight_scale": params["weight_scale"]}
        if self.asymmetric:
            stored = params["weight_zero_point"] - (128 if self.bits == 8 else 0)
            parts["weight_zero_point"] = stored.to(torch.int8)
        return parts

    def unpack(self, parts: Parts) -> Tensor:
        weight, scale = parts["weight"], parts["weight_scale"].float()
        codes = (unpack_nibbles(weight) if self.bits == 4 else weight).float()
        if self.asymmetric:
            grouped = codes.unflatten(1, (scale.shape[1], -1))
            grouped = grouped - parts["weight_zero_point"].float().unsqueeze(-1)
        else:
            grouped = (codes - 8 if self.bits == 4 else codes).unflatten(1, (scale.shape[1], -1))
        return (grouped * scale.unsqueeze(-1)).flatten(1)

    @property
    def _scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.group is None else torch.bfloat16

    def _stored(self, scale: Tensor) -> Tensor:
        # round first: the file keeps this dtype, so the weight must be snapped with what it keeps
        return scale.clamp(min=_TINY).to(self._scale_dtype)

    def _per_column(
        self, columns: int, params: Params, cols: slice | None, device: torch.device
    ) -> tuple[Tensor, Tensor | float]:
        index = group_of(columns, self.group, cols, device)
        scale = params["weight_scale"].float()[:, index]
        zero = params["weight_zero_point"][:, index] if self.asymmetric else 0.0
        return scale, zero

    def _codes(self, x: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
        low, high = (0, 2**self.bits - 1) if self.asymmetric else _symmetric_range(self.bits)
        return (torch.round(x.float() / scale) + zero).clamp(low, high)


@dataclass(frozen=True)
class TwoLevelInt:
    """4-bit codes that expand exactly to int8: a float scale per row, two nibbles per group.

    The second level's scale is at most ceil(238 / 15) = 16 and its zero at most 15, so one byte
    (``weight_scale_2``: ``scale2 - 1`` in the high nibble, zero in the low) holds both: 4 + 8/group
    bits per weight and 32 bits per row.
    """

    name: str
    group: int

    LIMIT = 119
    """Largest level-1 magnitude; rounding of zero and scale2 then stays within int8."""

    def layout(self, shape: tuple[int, int]) -> dict[str, Spec]:
        rows, columns = shape
        groups = _groups(self.name, columns, self.group)
        return {
            "weight": Spec((rows, _even(self.name, columns) // 2), torch.int8),
            "weight_scale": Spec((rows, 1), torch.float32),
            "weight_scale_2": Spec((rows, groups), torch.int8),
        }

    def fit(
        self,
        x: Tensor,
        importance: Tensor | None = None,
        *,
        clip: Tensor | float = 1.0,
        outer: Params | None = None,
    ) -> Params:
        x = x.float()
        if outer is None:
            scale = (x.abs().amax(1, keepdim=True) / self.LIMIT).clamp(min=_TINY)
        else:
            scale = outer["weight_scale"]
        low, high = _range_with_zero(in_groups(x / scale, self.group), clip)
        low, high = low.clamp(min=-self.LIMIT), high.clamp(max=self.LIMIT)
        # up, not to nearest: the last code must reach the end of the range that clip asked for
        scale2 = torch.ceil((high - low) / 15 - 1e-4).clamp(1, 16)
        zero = torch.round(-low / scale2).clamp(0, 15)
        # (code - zero) * scale2 must stay in int8 at both ends; a corner can miss by a few units
        zero = torch.minimum(zero, torch.floor(128 / scale2))
        zero = torch.maximum(zero, 15 - torch.floor(127 / scale2))
        return {"weight_scale": scale, "scale2": scale2, "zero": zero}

    def snap(self, x: Tensor, params: Params, cols: slice | None = None) -> Tensor:
        codes, scale2, zero = self._codes(x, params, cols)
        return (codes - zero) * scale2 * params["weight_scale"]

    def pack(self, x: Tensor, params: Params) -> Parts:
        codes, _, _ = self._codes(x, params, None)
        byte = params["zero"].to(torch.uint8) | ((params["scale2"] - 1).to(torch.uint8) << 4)
        return {
            "weight": pack_nibbles(codes),
            "weight_scale": params["weight_scale"],
            "weight_scale_2": byte.view(torch.int8),
        }

    def unpack(self, parts: Parts) -> Tensor:
        return self.expand(parts["weight"], parts["weight_scale_2"]).float() * parts["weight_scale"]

    @staticmethod
    def expand(weight: Tensor, weight_scale_2: Tensor) -> Tensor:
        """Exact int8 matrix (N, K) of packed codes (N, K/2) and group bytes (N, groups)."""
        byte = weight_scale_2.view(torch.uint8)
        scale2, zero = (byte >> 4).to(torch.int16) + 1, (byte & 15).to(torch.int16)
        codes = unpack_nibbles(weight).to(torch.int16).unflatten(1, (byte.shape[1], -1))
        return ((codes - zero.unsqueeze(-1)) * scale2.unsqueeze(-1)).flatten(1).to(torch.int8)

    def _codes(
        self, x: Tensor, params: Params, cols: slice | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        index = group_of(x.shape[1], self.group, cols, x.device)
        scale2, zero = params["scale2"][:, index], params["zero"][:, index]
        levels = x.float() / params["weight_scale"] / scale2
        return (torch.round(levels) + zero).clamp(0, 15), scale2, zero


def _symmetric_range(bits: int) -> tuple[int, int]:
    # int8 leaves out -128: kernels may negate a code
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _range_with_zero(grouped: Tensor, clip: Tensor | float) -> tuple[Tensor, Tensor]:
    low = (clip * grouped.amin(-1)).clamp(max=0)
    high = (clip * grouped.amax(-1)).clamp(min=0)
    return low, high


def _groups(name: str, columns: int, group: int | None) -> int:
    if group is None:
        return 1
    if columns % group:
        raise InputError(
            f"{name} needs input features divisible by {group}, got {columns}. "
            f"Use int4-row or int8-row for this layer, or keep it."
        )
    return columns // group


def _even(name: str, columns: int) -> int:
    if columns % 2:
        raise InputError(
            f"{name} needs an even number of input features, got {columns}. Use int8-row."
        )
    return columns
