# SPDX-License-Identifier: Apache-2.0
"""Ops that do more in the pass that quantizes: schema, fake and torch reference, as in ``ops.py``.

Every operation is float32 and rounded on its own, sums and the exponential too, so that a kernel
gives these numbers bit for bit. The order of a sum of K numbers is that of :func:`sum_rows`; it
depends on K alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtq.formats.activations import row_codes, row_scale
from dtq.formats.grid import doubled
from dtq.formats.groups import divide
from dtq.linalg.hadamard import rotate

_RUN = 16  # columns that one thread of a kernel holds side by side
_LANES = 32
_E4M3_MAX = 448.0


def sum_rows(x: Tensor) -> Tensor:
    """Sum of each row of float32 (M, K), as (M, 1), in the order of the kernels.

    Runs of 16 columns by halves; lane l of 32 adds the runs l, l + 32, ... one after the other;
    the lanes by halves.
    """
    rows, columns = x.shape
    x = torch.nn.functional.pad(x, (0, -columns % (_RUN * _LANES)))
    runs = _by_halves(x.reshape(rows, -1, _LANES, _RUN))  # (M, steps, lanes)
    total = torch.zeros_like(runs[:, 0])
    for step in range(runs.shape[1]):
        total = total + runs[:, step]
    return _by_halves(total).unsqueeze(1)


def exponential(t: Tensor) -> Tensor:
    """``e^t`` of float32, relative error below 3e-7 for t in [-87, 88.7].

    Smaller t are taken as -87; larger ones give infinity.
    """
    t = t.clamp(-87.0, 89.0)
    n = torch.round(t * 1.44269504)
    r = (t - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, 1 / 720)
    for c in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + c
    power = (n.nan_to_num().to(torch.int32) + 127) << 23  # the bits of 2^n
    return p * power.view(torch.float32)


def gelu(x: Tensor) -> Tensor:
    """GELU of float32 in its tanh form, as ``x / (1 + e^(-2u))``, u = sqrt(2/pi)(x + 0.044715 x^3).

    Within 3e-7 of ``F.gelu(x, approximate="tanh")``, which no two devices compute alike.
    """
    cube = x * x * x
    u2 = (x + cube * 0.044715) * 1.59576912  # 2 sqrt(2 / pi)
    return x / (1.0 + exponential(-u2))


def norm_modulate(
    x: Tensor,  # (M, K) any float dtype
    modulate_scale: Tensor | None,  # (B, K), B divides M: row r takes r // (M / B)
    modulate_shift: Tensor | None,  # (B, K)
    eps: float,
) -> Tensor:
    """LayerNorm without weights, then ``* (1 + scale) + shift``, float32 (M, K)."""
    x = x.float()
    rows, columns = x.shape
    count = x.new_full((1, 1), columns)  # a tensor: CUDA turns a number into its reciprocal
    centred = x - sum_rows(x) / count
    variance = sum_rows(centred * centred) / count
    root = (variance + eps).double().sqrt().float()  # in float32 it may miss the nearest number
    y = centred * (torch.ones_like(root) / root)
    if modulate_scale is not None and modulate_shift is not None:
        each = rows // max(len(modulate_scale), 1)
        y = y * (1.0 + modulate_scale.float()).repeat_interleave(each, 0)
        y = y + modulate_shift.float().repeat_interleave(each, 0)
    return y


def binned_quantize_rows(
    x: Tensor,  # (M, K) any float dtype
    pre_scale: Tensor | None,  # (K,) bfloat16
    perm: Tensor | None,  # (K,) int32
    hadamard_block: int,
    num_rotations: int,
    scale: Tensor | None,  # (bins,) float32, or None: one per row
    bin: Tensor | None,  # (1,) int64, the place in it; None is the first
    qmax: int = 127,
) -> tuple[Tensor, Tensor]:
    """Codes int8 (M, K) and their scales (M,) after the change of the input."""
    x = transform_input(x.float(), pre_scale, perm, hadamard_block, num_rotations)
    if scale is None:
        rows = row_scale(x, qmax)
    else:
        one = scale.reshape(-1)[:1] if bin is None else scale.reshape(-1).index_select(0, bin)
        rows = one.reshape(1, 1).expand(x.shape[0], 1)
    return row_codes(x, rows, qmax).to(torch.int8), rows.reshape(-1).clone()


def _norm_quantize_rows(
    x: Tensor,
    modulate_scale: Tensor | None,
    modulate_shift: Tensor | None,
    eps: float,
    *rest: Any,  # of binned_quantize_rows
) -> tuple[Tensor, Tensor]:
    return binned_quantize_rows(norm_modulate(x, modulate_scale, modulate_shift, eps), *rest)


def _gelu_quantize_rows(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return binned_quantize_rows(gelu(x.float()), *rest)


def _e4m3_quantize_rows(
    x: Tensor,  # (M, K) any float dtype
    pre_scale: Tensor | None,
    perm: Tensor | None,
    hadamard_block: int,
    num_rotations: int,
) -> tuple[Tensor, Tensor]:
    x = transform_input(x.float(), pre_scale, perm, hadamard_block, num_rotations)
    scale = x.abs().amax(1, keepdim=True) / x.new_full((1, 1), _E4M3_MAX)
    codes = divide(x, scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale.reshape(-1)  # (M, K), (M,)


def _e2m1_quantize_rows(
    x: Tensor,  # (M, K) any float dtype
    pre_scale: Tensor | None,
    perm: Tensor | None,
    hadamard_block: int,
    num_rotations: int,
) -> tuple[Tensor, Tensor]:
    """E2M1 levels times two, which int8 holds, and half the scale; as the format ``e2m1-row``."""
    x = transform_input(x.float(), pre_scale, perm, hadamard_block, num_rotations)
    codes, scale = doubled(x, x.abs().amax(1, keepdim=True))
    return codes.to(torch.int8), scale.reshape(-1)  # (M, K), (M,)


def transform_input(
    x: Tensor,
    pre_scale: Tensor | None,
    perm: Tensor | None,
    hadamard_block: int,
    num_rotations: int,
) -> Tensor:
    """What a layer does to its float32 input (M, K) before it quantizes; may be ``x`` itself."""
    if pre_scale is not None:
        x = x * pre_scale.float()
    if perm is not None:
        x = x[:, perm.long()]
    return rotate(x, hadamard_block, num_rotations)


def _by_halves(x: Tensor) -> Tensor:
    """Sum over the last axis, a power of two long: the first half plus the second, and again."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def codes_like(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Empty int8 codes and scales of rows, for fakes."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


def _e4m3_like(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(x.shape[:1], dtype=torch.float32)


TRANSFORM_ARGS = "Tensor? pre_scale, Tensor? perm, int hadamard_block, int num_rotations"
"""Part of schemas: what a layer does to its input first."""
_GRID = "Tensor? scale, Tensor? bin, int qmax=127"

OPS = (
    (
        "norm_quantize_rows(Tensor x, Tensor? modulate_scale, Tensor? modulate_shift, float eps,"
        f" {TRANSFORM_ARGS}, {_GRID}) -> (Tensor, Tensor)",
        _norm_quantize_rows,
        codes_like,
    ),
    (
        f"gelu_quantize_rows(Tensor x, {TRANSFORM_ARGS}, {_GRID}) -> (Tensor, Tensor)",
        _gelu_quantize_rows,
        codes_like,
    ),
    (
        f"binned_quantize_rows(Tensor x, {TRANSFORM_ARGS}, {_GRID}) -> (Tensor, Tensor)",
        binned_quantize_rows,
        codes_like,
    ),
    (
        f"e4m3_quantize_rows(Tensor x, {TRANSFORM_ARGS}) -> (Tensor, Tensor)",
        _e4m3_quantize_rows,
        _e4m3_like,
    ),
    (
        f"e2m1_quantize_rows(Tensor x, {TRANSFORM_ARGS}) -> (Tensor, Tensor)",
        _e2m1_quantize_rows,
        codes_like,
    ),
)
"""Schema, reference and fake, as rows of the table in ``ops.py``."""
