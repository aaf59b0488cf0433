# SPDX-License-Identifier: Apache-2.0
"""Floating-point codes that hardware multiplies: e4m3 rows, and FP4 with a scale per block.

- ``nvfp4``: blocks of 16, an e4m3 scale each, one float scale for the matrix;
  ``w = code * scale * scale_2`` (NVIDIA, "Pretraining LLMs with NVFP4", 2509.25149, sec. 2);
- ``nvfp4-46``: the same numbers, each block's largest magnitude at 6 or at 4, whichever errs less:
  nothing lies between 4 and 6, so blocks with values near 5 are better off ("Four Over Six",
  2512.02010);
- ``mxfp4``: blocks of 32, a power of two each, ``2^(floor(log2 max|w|) - 2)`` (OCP Microscaling
  specification 1.0, sec. 5.3.3 and 6.3).
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
)
from dtq.formats.grid import E2M1
from dtq.formats.packing import pack_bits, packed_width, unpack_bits

_E4M3_MAX = 448.0
_E4M3_TINY = 2.0**-9


@dataclass(frozen=True)
class Fp8:
    """e4m3 codes (four exponent bits, three of mantissa) with a float scale per row."""

    name: str

    group = None
    vector = 1
    data_dependent = False

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec(shape, torch.float8_e4m3fn),
            "weight_scale": TensorSpec((shape[0], 1), torch.float32),
        }

    def compute_qparams(
        self,
        x: Tensor,
        column_weights: Tensor | None = None,
        *,
        clip: Tensor | float = 1.0,
        outer: QParams | None = None,
    ) -> QParams:
        if outer is not None:
            return outer
        return {"weight_scale": clip * x.float().abs().amax(1, keepdim=True) / _E4M3_MAX}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        return self._codes(x, qparams).float() * qparams["weight_scale"]

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        return {"weight": self._codes(x, qparams), **qparams}

    def unpack(self, tensors: PackedTensors) -> Tensor:
        return tensors["weight"].float() * tensors["weight_scale"].float()

    def _codes(self, x: Tensor, qparams: QParams) -> Tensor:
        return _e4m3(divide(x.float(), qparams["weight_scale"]), -_E4M3_MAX)


@dataclass(frozen=True)
class NvFp4:
    """E2M1 codes, e4m3 block scales, one float scale for the matrix.

    Attributes:
        ends: levels that the largest magnitude of a block may be put at; the one with less error
            wins.
    """

    name: str
    ends: tuple[float, ...] = (6.0,)

    group = 16
    vector = 1
    data_dependent = False

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        blocks = groups_of(self.name, columns, self.group)
        return {
            "weight": TensorSpec((rows, packed_width(self.name, columns, 4)), torch.int8),
            "weight_scale": TensorSpec((rows, blocks), torch.float8_e4m3fn),
            "weight_scale_2": TensorSpec((1, 1), torch.float32),
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
        if outer is not None:
            scale_2 = outer["weight_scale_2"]
        else:  # the block with the largest magnitude gets the largest scale
            scale_2 = (x.abs().amax() / (min(self.ends) * _E4M3_MAX)).reshape(1, 1)
        peak = divide(clip * in_groups(x, self.group).abs().amax(-1), scale_2)
        # a block far below the others keeps the smallest scale there is rather than none
        tries = [
            {"weight_scale": _e4m3(peak / end, _E4M3_TINY), "weight_scale_2": scale_2}
            for end in self.ends
        ]
        if len(tries) == 1:
            return tries[0]
        weight = broadcast_weights(x, column_weights)
        errors = [
            in_groups((self.fake_quantize(x, t) - x).square() * weight, self.group).sum(-1)
            for t in tries
        ]
        best = torch.stack(errors).argmin(0, keepdim=True)  # (1, N, blocks)
        scales = torch.stack([t["weight_scale"].float() for t in tries]).gather(0, best)[0]
        return {"weight_scale": scales.to(torch.float8_e4m3fn), "weight_scale_2": scale_2}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        scale = self._per_column(x.shape[1], qparams, cols)
        return E2M1.round(divide(x.float(), scale)) * scale

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        codes = E2M1.codes(divide(x.float(), self._per_column(x.shape[1], qparams, None)))
        return {"weight": pack_bits(codes, 4), **qparams}

    def unpack(self, tensors: PackedTensors) -> Tensor:
        scale = tensors["weight_scale"].float() * tensors["weight_scale_2"].float()
        levels = in_groups(E2M1.of(unpack_bits(tensors["weight"], 4)), self.group)
        return (levels * scale.unsqueeze(-1)).flatten(1)

    def _per_column(self, columns: int, qparams: QParams, cols: slice | None) -> Tensor:
        scale = expand_groups(qparams["weight_scale"], columns, self.group, cols).float()
        return scale * qparams["weight_scale_2"]


@dataclass(frozen=True)
class MxFp4:
    """E2M1 codes and power-of-two block scales, stored as exponents biased by 127 (E8M0)."""

    name: str

    group = 32
    vector = 1
    data_dependent = False

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        blocks = groups_of(self.name, columns, self.group)
        return {
            "weight": TensorSpec((rows, packed_width(self.name, columns, 4)), torch.int8),
            "weight_scale": TensorSpec((rows, blocks), torch.uint8),
        }

    def compute_qparams(
        self,
        x: Tensor,
        column_weights: Tensor | None = None,
        *,
        clip: Tensor | float = 1.0,
        outer: QParams | None = None,
    ) -> QParams:
        peak = clip * in_groups(x.float(), self.group).abs().amax(-1)
        # floor(log2), exact; a block that is not finite gets the largest, and stays so
        exponent = torch.where(peak.isfinite(), torch.frexp(peak).exponent - 1, 128)
        # 1, not 0: 2^-127 is subnormal, and some devices flush those to zero
        return {"weight_scale": (exponent - 2 + 127).clamp(1, 254).to(torch.uint8)}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        scale = _power(expand_groups(qparams["weight_scale"], x.shape[1], self.group, cols))
        return E2M1.round(x.float() / scale) * scale

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        scale = _power(expand_groups(qparams["weight_scale"], x.shape[1], self.group, None))
        return {"weight": pack_bits(E2M1.codes(x.float() / scale), 4), **qparams}

    def unpack(self, tensors: PackedTensors) -> Tensor:
        levels = in_groups(E2M1.of(unpack_bits(tensors["weight"], 4)), self.group)
        return (levels * _power(tensors["weight_scale"]).unsqueeze(-1)).flatten(1)


def _e4m3(x: Tensor, low: float) -> Tensor:
    return x.clamp(low, _E4M3_MAX).to(torch.float8_e4m3fn)  # the cast alone may overflow to NaN


def _power(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) of a biased exponent: the bits of the float that it is."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)
