# SPDX-License-Identifier: Apache-2.0
"""Floating-point formats that hardware multiplies: e4m3 rows, and FP4 with a scale per block.

- ``nvfp4``: blocks of 16 columns with an e4m3 scale each, one float32 scale for the matrix;
  ``w = entry * scale * scale_2`` (NVIDIA, "Pretraining LLMs with NVFP4", 2509.25149, sec. 2);
- ``nvfp4-46``: the same numbers. The largest magnitude of a block becomes 6 or 4, whichever has
  the lower squared error: no E2M1 number lies between 4 and 6, so blocks with values near 5 gain
  from 4 ("Four Over Six", 2512.02010);
- ``mxfp4``: blocks of 32 columns with a power of two each, ``2^(floor(log2 max|w|) - 2)`` (OCP
  Microscaling specification 1.0, sec. 5.3.3 and 6.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.formats.base import Clip, Format, PackedTensors, QParams, TensorSpec
from dtq.formats.grid import E2M1, FixedCodebookFormat
from dtq.formats.groups import broadcast_weights, divide, in_groups

_E4M3_MAX = 448.0
_E4M3_TINY = 2.0**-9


@dataclass(frozen=True)
class Fp8(Format):
    """e4m3 numbers (4 exponent bits, 3 mantissa bits) with one float32 scale per row.

    Attributes:
        name: key of ``FORMATS``.
        whole: all rows have the same scale, because an engine takes one per matrix. It is stored
            for each row all the same, so that the kernels are those of ``fp8-row``.
    """

    name: str
    whole: bool = False

    group = None

    @property
    def data_dependent(self) -> bool:  # type: ignore[override]
        """Rows that share their scale have no clip of their own to search."""
        return self.whole

    @property
    def matrix_tensors(self) -> tuple[str, ...]:  # type: ignore[override]
        """The scale that all rows share, if they do."""
        return ("weight_scale",) if self.whole else ()

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """``weight``, one e4m3 number per weight, and ``weight_scale`` (N, 1)."""
        return {
            "weight": TensorSpec(shape, torch.float8_e4m3fn),
            "weight_scale": TensorSpec(
                (shape[0], 1), torch.float32, _different_scales if self.whole else None
            ),
        }

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        amax = x.abs().amax(1, keepdim=True)
        if self.whole:
            return {"weight_scale": amax.amax().expand_as(amax).contiguous() / _E4M3_MAX}
        return {"weight_scale": clip * amax / _E4M3_MAX}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        """Nearest representable values, float32; see :meth:`Format.fake_quantize`."""
        return self._quantize(x, qparams).float() * qparams["weight_scale"]

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        """e4m3 numbers of ``x`` (N, K), and the scale."""
        return {"weight": self._quantize(x, qparams), **qparams}

    def unpack(self, tensors: PackedTensors) -> Tensor:
        """The float32 matrix (N, K) that packed tensors represent."""
        return tensors["weight"].float() * tensors["weight_scale"].float()

    def _quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        return _e4m3(divide(x.float(), qparams["weight_scale"]), -_E4M3_MAX)


@dataclass(frozen=True)
class NvFp4(FixedCodebookFormat):
    """E2M1 codes, e4m3 block scales, one float32 scale for the matrix.

    Attributes:
        name: key of ``FORMATS``.
        block_amax: E2M1 numbers that the largest magnitude of a block may become; of several, the
            one with the lower squared error is taken.
    """

    name: str
    block_amax: tuple[float, ...] = (6.0,)

    codebook = E2M1
    group = 16
    matrix_tensors = ("weight_scale_2",)

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Packed codes, e4m3 ``weight_scale`` (N, K / 16), float32 ``weight_scale_2`` (1, 1)."""
        specs = self._packed_specs(shape, 4, torch.float8_e4m3fn)
        return {**specs, "weight_scale_2": TensorSpec((1, 1), torch.float32)}

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        if outer is not None:
            scale_2 = outer["weight_scale_2"]
        else:  # the block with the largest magnitude gets the largest scale
            scale_2 = (x.abs().amax() / (min(self.block_amax) * _E4M3_MAX)).reshape(1, 1)
        amax = divide(clip * in_groups(x, self.group).abs().amax(-1), scale_2)
        # a block far below the others keeps the smallest scale there is, not a scale of zero
        candidates = [
            {"weight_scale": _e4m3(amax / target, _E4M3_TINY), "weight_scale_2": scale_2}
            for target in self.block_amax
        ]
        if len(candidates) == 1:
            return candidates[0]
        weight = broadcast_weights(x, weights)
        errors = [
            in_groups((self.fake_quantize(x, c) - x).square() * weight, self.group).sum(-1)
            for c in candidates
        ]
        best = torch.stack(errors).argmin(0, keepdim=True)  # (1, N, blocks)
        scales = torch.stack([c["weight_scale"].float() for c in candidates]).gather(0, best)[0]
        return {"weight_scale": scales.to(torch.float8_e4m3fn), "weight_scale_2": scale_2}

    def _float_scale(self, scale: Tensor, qparams: QParams) -> Tensor:
        return scale.float() * qparams["weight_scale_2"].float()


@dataclass(frozen=True)
class MxFp4(FixedCodebookFormat):
    """E2M1 codes and power-of-two block scales, stored as exponents biased by 127 (E8M0)."""

    name: str

    codebook = E2M1
    group = 32

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Packed codes, and ``weight_scale``, uint8 exponents (N, K / 32)."""
        return self._packed_specs(shape, 4, torch.uint8)

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        amax = clip * in_groups(x, self.group).abs().amax(-1)
        # floor(log2), exact; a block that is not finite gets the largest exponent and stays so
        exponent = torch.where(amax.isfinite(), torch.frexp(amax).exponent - 1, 128)
        # 1, not 0: 2^-127 is subnormal, and some devices flush subnormals to zero
        return {"weight_scale": (exponent - 2 + 127).clamp(1, 254).to(torch.uint8)}

    def _float_scale(self, scale: Tensor, qparams: QParams) -> Tensor:
        return (scale.to(torch.int32) << 23).view(torch.float32)  # 2^(e - 127): its float32 bits


def _different_scales(weight_scale: Tensor) -> str | None:
    same = bool((weight_scale == weight_scale[0]).all())
    return None if same else "scales of rows that are not all equal"


def _e4m3(x: Tensor, low: float) -> Tensor:
    return x.clamp(low, _E4M3_MAX).to(torch.float8_e4m3fn)  # the cast alone may overflow to NaN
