# SPDX-License-Identifier: Apache-2.0
"""int8 attention: reference and fake.

Both products of attention are integer: Q K^T of int8 codes, and P V of 8-bit probabilities and
int8 codes (SageAttention, arXiv 2410.02367, section 4, variant SAGEAttn-vB). The mean of K over
the tokens is subtracted first, which changes no probability (section 4.2). The mean of V is
subtracted too and added to the output, which is exact because the probabilities of a query sum to
one (SageAttention2, arXiv 2411.10958, section 3.3). The softmax is online over tiles of keys
(FlashAttention-2, arXiv 2307.08691, algorithm 1).

Every operation is float32 and rounded on its own, in the order written here, so that a kernel
gives these numbers bit for bit. Sums of integers are below 2^24, so float32 holds them exactly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dtq.kernels.ops_quantize import exponential

TILE = 64
"""Keys of a tile: a query has one maximum, and its probabilities one scale, per tile."""
WIDEST_HEAD = 256
"""Channels of a head, at most: the sums stay below 2^24."""

_LOG2E = 1.4426950408889634
_LN2 = 0.693147182464599609375  # the float32 next to ln 2
_QMAX = 127.0
_PMAX = 255.0
_SMALLEST = 1e-30  # largest magnitude of a row of zeros
_NOTHING = -2e30  # maximum of no score
_LOWEST = -1e30  # finite biases are at least this: one such as finfo.min does not overflow
_POLYNOMIAL = (0.055008981, 0.24221112, 0.69328294, 1.0)
"""2^r for r in [-0.5, 0.5], relative error below 1.1e-4; minimax with 2^0 exact."""


def column_mean(x: Tensor) -> Tensor:
    """Mean of float32 (..., N, D) over the tokens, as (..., 1, D), in the order of the kernels.

    The tokens of a tile are added one after the other, then the sums of the tiles.
    """
    tokens = x.shape[-2]
    padded = F.pad(x, (0, 0, 0, -tokens % TILE))
    tiles = padded.reshape(*x.shape[:-2], -1, TILE, x.shape[-1])
    sums = tiles[..., 0, :]
    for i in range(1, TILE):
        sums = sums + tiles[..., i, :]
    total = sums[..., 0, :]
    for i in range(1, sums.shape[-2]):
        total = total + sums[..., i, :]
    return (total / total.new_full((), tokens)).unsqueeze(-2)


def codes(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes, as float32, and their scale.

    Args:
        x: float32.
        amax: largest magnitude, broadcast to ``x``; below 1e-30 the codes and the scale are 0.

    Returns:
        The codes like ``x``, and the scales like ``amax``.
    """
    nothing = amax < _SMALLEST
    scale = torch.where(nothing, 0.0, amax / amax.new_full((), _QMAX))
    inverse = torch.where(nothing, 0.0, amax.new_full((), _QMAX) / amax)
    return torch.round(x * inverse), scale


def int8_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention with integer products.

    Args:
        q: (B, H, Nq, D), any float dtype; D at most ``WIDEST_HEAD``.
        k: (B, Hk, Nk, D), where Hk divides H: neighbouring heads of ``q`` share a head.
        v: (B, Hk, Nk, Dv).
        mask: broadcast to (B, H, Nq, Nk); boolean, True takes part, or float, added to the scores.
            None for none.
        scale: the scores are multiplied by it.

    Returns:
        (B, H, Nq, Dv) in the dtype of ``q``, laid out in memory as (B, Nq, H, Dv). A query all of
        whose keys are masked gets zeros, as in torch. A query, a key or a value that is not finite
        gives NaN wherever it would in float, and maybe in more channels.
    """
    check(q, k, v, mask)
    share = q.shape[1] // k.shape[1]
    kf, vf = (x.float().repeat_interleave(share, 1) for x in (k, v))
    qf = q.float()
    centred = kf - column_mean(kf)
    k_codes, k_scale = codes(centred, centred.abs().amax(-1, keepdim=True))
    q_codes, q_scale = codes(qf, qf.abs().amax(-1, keepdim=True))
    v_mean = column_mean(vf)
    centred = vf - v_mean
    v_codes, v_scale = codes(centred, centred.abs().amax(-2, keepdim=True))
    q_factor = q_scale * q_scale.new_full((), scale * _LOG2E)
    bias = None if mask is None else _bias(mask)
    total, weight = _online(q_codes, q_factor, k_codes, k_scale, v_codes, bias)
    live = weight > 0
    inverse = torch.where(live, 1.0 / weight, 0.0)
    out = (total * inverse) * v_scale + torch.where(live, v_mean, 0.0)
    out = out + (q_factor * 0.0 + k_scale.sum(-2, keepdim=True) * 0.0)  # NaN stays NaN
    result = _fake(q, k, v, mask, scale)
    result.copy_(out)
    return result


def _online(
    q_codes: Tensor,
    q_factor: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sums over the keys of probabilities times values, and of probabilities."""
    most = torch.full_like(q_factor, _NOTHING)
    weight = torch.zeros_like(q_factor)
    total = q_codes.new_zeros((*q_codes.shape[:-1], v_codes.shape[-1]))
    for at in range(0, k_codes.shape[-2], TILE):
        keys = slice(at, at + TILE)
        sums = q_codes @ k_codes[..., keys, :].transpose(-1, -2)
        scores = (sums * k_scale[..., keys, :].transpose(-1, -2)) * q_factor
        if bias is not None:
            one = bias.shape[-1] == 1
            scores = scores + (bias if one else bias[..., keys])
        top = scores.amax(-1, keepdim=True).clamp(min=_NOTHING)
        p = probabilities(scores - top)
        after = torch.maximum(most, top)
        old, new = (exponential((x - after) * _LN2) for x in (most, top))
        total = total * old + (p @ v_codes[..., keys, :]) * new
        weight = weight * old + p.sum(-1, keepdim=True) * new
        most = after
    return total, weight


def probabilities(x: Tensor) -> Tensor:
    """``round(255 * 2^x)`` of float32 x <= 0; below -100, 0."""
    x = x.clamp(min=-100.0)
    n = torch.round(x)
    r = x - n
    p = torch.full_like(r, _PMAX * _POLYNOMIAL[0])
    for c in _POLYNOMIAL[1:]:
        p = p * r + p.new_full((), _PMAX * c)
    bits = p.view(torch.int32) + (n.nan_to_num().to(torch.int32) << 23)
    return torch.round(bits.view(torch.float32))


def _bias(mask: Tensor) -> Tensor:
    """What is added to scores of base 2."""
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, -math.inf)
    bias = mask.float() * _LOG2E
    return torch.where(mask == -math.inf, -math.inf, bias.clamp(min=_LOWEST))


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Check shapes.

    Raises:
        ValueError: they do not fit, or a head is too wide.
    """
    if reason := unsupported_reason(q, k, v, mask):
        raise ValueError(f"int8_attention: {reason}")


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Why the op does not take these shapes; None if it does.

    Args:
        q: see :func:`int8_attention`.
        k: likewise.
        v: likewise.
        mask: likewise.
    """
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if {q.dim(), k.dim(), v.dim()} != {4}:
        return f"q, k and v are (batch, heads, tokens, channels): {shapes}"
    fits = q.shape[0] == k.shape[0] == v.shape[0] and q.shape[-1] == k.shape[-1]
    fits = fits and k.shape[1:3] == v.shape[1:3] and k.shape[1] > 0 and not q.shape[1] % k.shape[1]
    if not fits or not k.shape[2]:
        return f"shapes do not fit: {shapes}"
    if max(q.shape[-1], v.shape[-1]) > WIDEST_HEAD:
        return f"heads have at most {WIDEST_HEAD} channels: {shapes}"
    if mask is not None:
        scores = (*q.shape[:3], k.shape[2])
        pairs = zip(reversed(mask.shape), reversed(scores), strict=False)
        if mask.dim() > 4 or any(has not in (1, wants) for has, wants in pairs):
            return f"mask {list(mask.shape)} for scores {list(scores)}"
    return None


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)


OPS = (
    (
        "int8_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
        int8_attention,
        _fake,
    ),
)
"""Schema, reference and fake; rows of the table in ``ops.py``."""
