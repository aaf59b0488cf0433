# SPDX-License-Identifier: Apache-2.0
"""Ops that quantize activations, alone or in one pass with a norm or GELU: references and fakes.

Every operation is float32 and rounded on its own, sums and the exponential too, so that a kernel
gives these numbers bit for bit. The order of a sum of K numbers is that of :func:`sum_rows`; it
depends on K alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtq.formats.activations import ACTIVATION_FORMATS, fake_quantize, row_codes, row_scale
from dtq.formats.grid import doubled
from dtq.formats.groups import divide
from dtq.linalg.hadamard import rotate

_RUN = 16  # neighbouring columns that one thread of a kernel holds
_LANES = 32
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def sum_rows(x: Tensor) -> Tensor:
    """Sum of each row of float32 (M, K), as (M, 1), in the order of the kernels.

    Runs of 16 columns are summed by halves; the sums of 32 runs by neighbors: the first with the
    second, the third with the fourth, then these with one another. Place l of 32 adds the results
    l, l + 32, ... one after the other, and the places are summed by neighbors.
    """
    rows, columns = x.shape
    steps = max(1, -(-columns // (_RUN * _LANES * _LANES)))
    x = torch.nn.functional.pad(x, (0, steps * _RUN * _LANES * _LANES - columns))
    runs = _sum_by_halves(x.reshape(rows, steps, _LANES, _LANES, _RUN))
    warps = _sum_by_neighbors(runs)  # (M, steps, 32 places)
    total = warps[:, 0]
    for step in range(1, steps):
        total = total + warps[:, step]
    return _sum_by_neighbors(total).unsqueeze(1)


def _sum_by_halves(x: Tensor) -> Tensor:
    """Sum over the last axis, a power of two long: the first half plus the second, repeatedly."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _sum_by_neighbors(x: Tensor) -> Tensor:
    """Sum over the last axis, a power of two long: even places plus odd ones, repeatedly."""
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x.squeeze(-1)


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

    The power has base 2, t = -2u / ln 2, and is a polynomial of degree 5 in the fraction of t. The
    error is at most 3e-7 of the value plus 1e-7. Below -10, where GELU is above -2e-37, x is taken
    as -10. ``F.gelu(x, approximate="tanh")`` is as exact, but no two devices compute it alike.
    """
    low = torch.where(x < -10.0, -10.0, x)
    t = low * (low * low * -0.10294324159622192 + -2.302208185195923)
    t = torch.where(t < -126.0, -126.0, t)
    n = torch.round(t)
    r = t - n
    p = torch.full_like(r, _POWER[0])
    for c in (*_POWER[1:], 1.0):
        p = p * r + c
    bits = p.view(torch.int32) + (n.nan_to_num().to(torch.int32) << 23)  # p * 2^n
    return low / (1.0 + bits.view(torch.float32))


_POWER = (
    0.001326472731307149,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
)
"""``2^r = 1 + r (c_1 + r (c_2 + ...))`` for r in [-1/2, 1/2], relative error 1e-7: c_5 to c_1."""


def norm_modulate(
    x: Tensor, modulate_scale: Tensor | None, modulate_shift: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm without weights, then ``* (1 + scale) + shift``.

    Args:
        x: (M, K), any float dtype.
        modulate_scale: (B, K), where B images divide M: row r takes ``r // (M / B)``; None for no
            modulation.
        modulate_shift: (B, K), likewise.
        eps: added to the variance.

    Returns:
        float32 (M, K).
    """
    x = x.float()
    rows, columns = x.shape
    count = x.new_full((1, 1), columns)  # a tensor: CUDA multiplies by the reciprocal of a number
    centred = x - sum_rows(x) / count
    variance = sum_rows(centred * centred) / count
    root = (variance + eps).double().sqrt().float()  # in float32 it may miss the nearest number
    y = centred * (torch.ones_like(root) / root)
    if modulate_scale is not None and modulate_shift is not None:
        tokens = rows // max(len(modulate_scale), 1)  # of an image
        y = y * (1.0 + modulate_scale.float()).repeat_interleave(tokens, 0)
        y = y + modulate_shift.float().repeat_interleave(tokens, 0)
    return y


def transform_input(
    x: Tensor,
    pre_scale: Tensor | None,
    perm: Tensor | None,
    hadamard_block: int,
    num_rotations: int,
) -> Tensor:
    """The input transform of a layer: smoothing, channel permutation, block rotation.

    Args:
        x: float32 (M, K).
        pre_scale: bfloat16 (K,), multiplied with the channels; None for none.
        perm: int32 (K,), the channel that moves to each place; None for none.
        hadamard_block: channels of a Hadamard block, a power of two that divides K; 1: no rotation.
        num_rotations: 1, or 2 with the blocks transposed in between.

    Returns:
        float32 (M, K), which may be ``x`` itself.
    """
    if pre_scale is not None:
        x = x * pre_scale.float()
    if perm is not None:
        x = x[:, perm.long()]
    return rotate(x, hadamard_block, num_rotations)


def binned_quantize_rows(
    x: Tensor,
    pre_scale: Tensor | None,
    perm: Tensor | None,
    hadamard_block: int,
    num_rotations: int,
    scale: Tensor | None,
    bin: Tensor | None,
    qmax: int = 127,
) -> tuple[Tensor, Tensor]:
    """Transform the input and round it to int8, with a scale per row or a stored scale.

    Args:
        x: (M, K), any float dtype.
        pre_scale: bfloat16 (K,), see :func:`transform_input`.
        perm: int32 (K,), likewise.
        hadamard_block: likewise.
        num_rotations: likewise.
        scale: float32 (bins,), one stored scale per timestep bin; None: one per row, from its amax.
        bin: int64 (1,), index into ``scale``; None is the first.
        qmax: largest quantized value; 127 are 8 bits.

    Returns:
        int8 (M, K) and the scales, float32 (M,).
    """
    x = transform_input(x.float(), pre_scale, perm, hadamard_block, num_rotations)
    if scale is None:
        rows = row_scale(x, qmax)
    else:
        one = scale.reshape(-1)[:1] if bin is None else scale.reshape(-1).index_select(0, bin)
        rows = one.reshape(1, 1).expand(x.shape[0], 1)
    return row_codes(x, rows, qmax).to(torch.int8), rows.reshape(-1).clone()


def _quantize_rows(
    x: Tensor,  # (M, K) any float dtype
    pre_scale: Tensor | None,  # (K,) bfloat16
    hadamard_block: int,
    scale: Tensor | None,  # (1,) float32, or None: one per row
    qmax: int = 127,
) -> tuple[Tensor, Tensor]:
    """:func:`binned_quantize_rows` with one bin, and without a permutation."""
    return binned_quantize_rows(x, pre_scale, None, hadamard_block, 1, scale, None, qmax)


def _norm_quantize_rows(
    x: Tensor,
    modulate_scale: Tensor | None,
    modulate_shift: Tensor | None,
    eps: float,
    *quantize: Any,  # of binned_quantize_rows
) -> tuple[Tensor, Tensor]:
    y = norm_modulate(x, modulate_scale, modulate_shift, eps)
    return binned_quantize_rows(y, *quantize)


def _gelu_quantize_rows(x: Tensor, *quantize: Any) -> tuple[Tensor, Tensor]:
    return binned_quantize_rows(gelu(x.float()), *quantize)


def _e4m3_quantize_rows(x: Tensor, *transform: Any) -> tuple[Tensor, Tensor]:
    x = transform_input(x.float(), *transform)
    scale = x.abs().amax(1, keepdim=True) / x.new_full((1, 1), _E4M3_MAX)
    x_q = divide(x, scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return x_q, scale.reshape(-1)  # (M, K), (M,)


def _e2m1_quantize_rows(x: Tensor, *transform: Any) -> tuple[Tensor, Tensor]:
    """Twice the E2M1 values, which int8 holds, and half the scale; as the format ``e2m1-row``."""
    x = transform_input(x.float(), *transform)
    x_q, scale = doubled(x, x.abs().amax(1, keepdim=True))
    return x_q.to(torch.int8), scale.reshape(-1)  # (M, K), (M,)


def _transform_rows(x: Tensor, *transform: Any) -> Tensor:
    return transform_input(x.float(), *transform).clone()  # (M, K) float32


def _round_rows(
    x: Tensor,  # (M, K) any float dtype
    pre_scale: Tensor | None,  # (K,) bfloat16
    perm: Tensor | None,  # (K,) int32
    hadamard_block: int,
    num_rotations: int,
    activation_format: str,  # a key of ACTIVATION_FORMATS
    dtype: torch.dtype,
) -> Tensor:
    x = transform_input(x.float(), pre_scale, perm, hadamard_block, num_rotations)
    rounded = fake_quantize(x, ACTIVATION_FORMATS[activation_format])
    return rounded.to(dtype, copy=True)  # (M, K)


def _int8_fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


def _e4m3_fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    x_q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return x_q, x.new_empty(x.shape[:1], dtype=torch.float32)


def _float_fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _round_rows_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=rest[-1])


TRANSFORM_ARGS = "Tensor? pre_scale, Tensor? perm, int hadamard_block, int num_rotations"
"""Part of schemas: the input transform of a layer."""

_QUANTIZE = f"{TRANSFORM_ARGS}, Tensor? scale, Tensor? bin, int qmax=127) -> (Tensor, Tensor)"
_TRANSFORM = f"Tensor x, {TRANSFORM_ARGS}"
_ROUNDING = "str activation_format, ScalarType dtype"
_NORM = "Tensor? modulate_scale, Tensor? modulate_shift, float eps"

OPS = (
    (
        "quantize_rows(Tensor x, Tensor? pre_scale, int hadamard_block, Tensor? scale,"
        " int qmax=127) -> (Tensor, Tensor)",
        _quantize_rows,
        _int8_fake,
    ),
    (f"binned_quantize_rows(Tensor x, {_QUANTIZE}", binned_quantize_rows, _int8_fake),
    (f"norm_quantize_rows(Tensor x, {_NORM}, {_QUANTIZE}", _norm_quantize_rows, _int8_fake),
    (f"gelu_quantize_rows(Tensor x, {_QUANTIZE}", _gelu_quantize_rows, _int8_fake),
    (f"e4m3_quantize_rows({_TRANSFORM}) -> (Tensor, Tensor)", _e4m3_quantize_rows, _e4m3_fake),
    (f"e2m1_quantize_rows({_TRANSFORM}) -> (Tensor, Tensor)", _e2m1_quantize_rows, _int8_fake),
    (f"transform_rows({_TRANSFORM}) -> Tensor", _transform_rows, _float_fake),
    (f"round_rows({_TRANSFORM}, {_ROUNDING}) -> Tensor", _round_rows, _round_rows_fake),
)
"""Schema, reference and fake of each op; rows of the table in ``ops.py``."""
