# SPDX-License-Identifier: Apache-2.0
"""Tiles of Nunchaku's kernels: in what order their files have codes, scales and branches.

A warp multiplies 128 rows by 64 columns with the instruction mma.m16n8k64, and every lane loads
what it needs as one piece of memory. Each function here moves values and changes none; each has an
inverse. The layouts are facts of Nunchaku's packer (Apache-2.0), whose output the tests compare.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.formats.packing import pack_bits, unpack_bits

ROWS, COLUMNS, RANK, GROUP = 128, 128, 16, 64
"""What rows, columns and the rank of a layer are multiples of, and columns of a scale."""


def tiled_codes(codes: Tensor) -> Tensor:
    """4-bit two's complement codes (N, K), as int8 (N, K / 2) in tiles.

    Row ``16 a + 8 b + c`` and column ``32 d + 8 e + f`` of a tile are nibble f of a word of lane
    ``4 c + e``.
    """
    n, k = codes.shape
    split = codes.reshape(n // ROWS, 8, 2, 8, k // GROUP, 2, 4, 8)  # tile, a, b, c, tile, d, e, f
    order = split.permute(0, 4, 1, 3, 6, 2, 5, 7)
    return pack_bits((order & 15).reshape(-1, 8), 4).view(torch.int8).reshape(n, k // 2)


def untiled_codes(packed: Tensor) -> Tensor:
    """Inverse of :func:`tiled_codes`, int8 (N, K)."""
    n, k = packed.shape[0], 2 * packed.shape[1]
    codes = (unpack_bits(packed.reshape(-1, 4), 4) ^ 8).to(torch.int8) - 8
    order = codes.reshape(n // ROWS, k // GROUP, 8, 8, 4, 2, 2, 8)
    return order.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(n, k)


def tiled_scales(scale: Tensor) -> Tensor:
    """Scales (N, G) as (G, N) in tiles; a vector (N,) stays one.

    Of each 128 rows, row ``16 a + 8 b + 2 c + d`` stands at ``16 a + 4 c + 2 b + d``.
    """
    n = len(scale)
    split = scale.reshape(n // ROWS, 8, 2, 4, 2, -1).permute(0, 5, 1, 3, 2, 4)
    tiles = split.contiguous()
    return tiles.reshape(n) if scale.ndim == 1 else tiles.reshape(-1, n)


def untiled_scales(tiles: Tensor) -> Tensor:
    """Inverse of :func:`tiled_scales`."""
    n = tiles.shape[-1]
    split = tiles.reshape(n // ROWS, -1, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1)
    return split.reshape(n) if tiles.ndim == 1 else split.reshape(n, -1)


def tiled_branch(weight: Tensor) -> Tensor:
    """16-bit matrix (M, R) of a branch in tiles of 16 by 16: M channels, R the rank.

    Row ``8 a + b`` and column ``8 c + 2 d + e`` of a tile are a value of lane ``4 b + d``.
    """
    m, r = weight.shape
    split = weight.reshape(m // 16, 2, 8, r // 16, 2, 4, 2)  # tile, a, b, tile, c, d, e
    return split.permute(0, 3, 2, 5, 1, 4, 6).reshape(m, r)


def untiled_branch(tiles: Tensor) -> Tensor:
    """Inverse of :func:`tiled_branch`."""
    m, r = tiles.shape
    split = tiles.reshape(m // 16, r // 16, 8, 4, 2, 2, 2)
    return split.permute(0, 4, 2, 1, 5, 3, 6).reshape(m, r)


def tiled_down(down: Tensor) -> Tensor:
    """``proj_down`` (R, K) as (K, R): tiles of rank by channels, in the order of the channels."""
    r, k = down.shape
    split = down.reshape(r // 16, 2, 8, k // 16, 2, 4, 2)
    return split.permute(3, 0, 2, 5, 1, 4, 6).reshape(k, r)


def untiled_down(tiles: Tensor) -> Tensor:
    """Inverse of :func:`tiled_down`."""
    k, r = tiles.shape
    split = tiles.reshape(k // 16, r // 16, 8, 4, 2, 2, 2)
    return split.permute(1, 4, 2, 0, 5, 3, 6).reshape(r, k)


def awq_words(codes: Tensor) -> Tensor:
    """Codes from 0 to 15 (N, K) as int32 (N / 4, K / 2), for weight-only layers.

    Column ``32 a + 8 b + 2 c + d`` of a group of 64 is nibble ``4 d + b`` of word ``4 a + c``; the
    words of four rows stand one after the other for each group.
    """
    n, k = codes.shape
    split = codes.reshape(n // 4, 4, k // GROUP, 2, 4, 4, 2)  # -, row, group, a, b, c, d
    order = split.permute(0, 2, 1, 3, 5, 6, 4)
    return pack_bits(order.reshape(-1, 8), 4).view(torch.int32).reshape(n // 4, k // 2)


def awq_codes(words: Tensor) -> Tensor:
    """Inverse of :func:`awq_words`, int8 (N, K)."""
    n, k = 4 * words.shape[0], 2 * words.shape[1]
    codes = unpack_bits(words.reshape(-1, 1).view(torch.int8), 4).to(torch.int8)
    order = codes.reshape(n // 4, k // GROUP, 4, 2, 4, 2, 4)
    return order.permute(0, 2, 1, 3, 6, 4, 5).reshape(n, k)
