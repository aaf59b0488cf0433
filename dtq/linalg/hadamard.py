# SPDX-License-Identifier: Apache-2.0
"""The fast Walsh-Hadamard transform over blocks of columns, and reproducible random signs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_CACHED = 2**16  # numbers that stay in the cache of a core


def fwht(x: Tensor, block: int) -> Tensor:
    """Orthonormal Sylvester-Hadamard transform of each ``block`` consecutive columns.

    The butterflies run in the dtype of ``x``, smallest stride first. Every kernel adds in this
    order, so quantized values agree bit for bit whatever the batch. The transform is symmetric and
    its own inverse.

    Args:
        x: float (..., K), K a multiple of ``block``.
        block: a power of two; 1 leaves ``x`` as it is.

    Returns:
        The transform, the shape and dtype of ``x``.
    """
    if block == 1:
        return x
    runs = x.reshape(-1, block)
    out = torch.empty_like(runs)
    step = max(1, _CACHED // block if x.device.type == "cpu" else len(runs))
    for start in range(0, len(runs), step):
        # one run per column: at every stride, neighbors in memory are added to neighbors
        chunk = runs[start : start + step].T.clone(memory_format=torch.contiguous_format)
        stride = 1
        while stride < block:
            pairs = chunk.view(-1, 2, stride, chunk.shape[1])
            a, b = pairs[:, 0], pairs[:, 1]
            difference = a - b
            a += b
            b.copy_(difference)
            stride *= 2
        out[start : start + step] = chunk.mul_(block**-0.5).T
    return out.view(x.shape)


def rotate(x: Tensor, block: int, num_rotations: int = 1) -> Tensor:
    """Rotate the columns of (..., K) with one or two block transforms.

    Two rotations have an exchange between them: the columns of each block are distributed over all
    blocks. Together they spread one channel over ``block * block`` others with 2 log2(block)
    additions per channel.
    """
    x = fwht(x, block)
    return fwht(_transpose_blocks(x, block), block) if num_rotations == 2 else x


def rotate_back(x: Tensor, block: int, num_rotations: int = 1) -> Tensor:
    """Inverse of :func:`rotate`."""
    x = fwht(x, block)
    return fwht(_transpose_blocks(x, x.shape[-1] // block), block) if num_rotations == 2 else x


def _transpose_blocks(x: Tensor, block: int) -> Tensor:
    """View the columns as (K / block, block), and transpose."""
    return x.unflatten(-1, (-1, block)).transpose(-1, -2).flatten(-2)


def block_for(columns: int, largest: int = 64) -> int:
    """The largest power of two up to ``largest`` that divides ``columns``."""
    block = 1
    while block < largest and columns % (2 * block) == 0:
        block *= 2
    return block


def signs(columns: int, seed: int) -> Tensor:
    """``columns`` signs +-1 as float32, the same on every machine and torch version.

    Column j takes the top bit of the j-th output of splitmix64 (Steele et al., 2014).
    """
    return torch.tensor(_signs(columns, seed))


@functools.lru_cache(maxsize=64)  # a search asks for the same ones with every candidate
def _signs(columns: int, seed: int) -> tuple[float, ...]:
    state = (seed * 0x9E3779B97F4A7C15 + 1) & _MASK
    values = []
    for _ in range(columns):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        values.append(1.0 if (z ^ (z >> 31)) >> 63 else -1.0)
    return tuple(values)


def regular_signs(block: int) -> Tensor:
    """Signs ``D`` of the regular Hadamard matrix ``R = A S D`` of size ``block``, float32 (block,).

    ``R`` is the n-th Kronecker power of the 4 x 4 matrix with rows ``1 1 1 -1``, ``1 1 -1 1``,
    ``1 -1 1 1`` and ``-1 1 1 1``, over ``2^n`` (ConvRot, 2512.03673). Its rows have equal
    sums, so that it also spreads a mean that all channels share. ``S`` is the transform of
    :func:`fwht`, ``A`` the signed permutation of :func:`regular_columns`. ``R`` is symmetric, hence
    ``x R = (x D) S A^T``.

    Args:
        block: a power of 4.
    """
    sign = torch.ones(1)
    while len(sign) < block:
        sign = torch.kron(sign, torch.tensor([1.0, 1.0, 1.0, -1.0]))
    return sign


def regular_columns(block: int) -> Tensor:
    """Permutation of ``A^T`` in :func:`regular_signs`, int64 (block,); the signs are the same.

    Column i of ``x R`` is ``regular_signs(block)[i]`` times column ``regular_columns(block)[i]`` of
    ``(x D) S``. The permutation is its own inverse.

    Args:
        block: a power of 4.
    """
    perm = torch.zeros(1, dtype=torch.int64)
    while len(perm) < block:
        perm = (4 * perm.unsqueeze(1) + torch.tensor([0, 2, 1, 3])).flatten()
    return perm


def regular_block_for(columns: int, largest: int = 256) -> int:
    """The largest power of four up to ``largest`` that divides ``columns``; 1 if 4 does not."""
    block = 1
    while 4 * block <= largest and columns % (4 * block) == 0:
        block *= 4
    return block
