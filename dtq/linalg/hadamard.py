# SPDX-License-Identifier: Apache-2.0
"""The fast Walsh-Hadamard transform over blocks of columns, and reproducible random signs."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_CACHED = 2**16  # numbers that stay in the cache of a core


def fwht(x: Tensor, block: int) -> Tensor:
    """Orthonormal Sylvester-Hadamard transform of each run of ``block`` columns.

    Butterflies in the dtype of ``x``, smallest distance first: every kernel adds in this order, so
    that codes agree bit for bit whatever the batch. Symmetric and its own inverse.

    Args:
        x: float (..., K), K a multiple of ``block``.
        block: a power of two; 1 leaves ``x`` alone.
    """
    if block == 1:
        return x
    runs = x.reshape(-1, block)
    made = torch.empty_like(runs)
    step = max(1, _CACHED // block if x.device.type == "cpu" else len(runs))
    for start in range(0, len(runs), step):
        # one run a column: neighbours in memory are then added to neighbours at every distance
        now = runs[start : start + step].T.clone(memory_format=torch.contiguous_format)
        half = 1
        while half < block:
            pairs = now.view(-1, 2, half, now.shape[1])
            a, b = pairs[:, 0], pairs[:, 1]
            difference = a - b
            a += b
            b.copy_(difference)
            half *= 2
        made[start : start + step] = now.mul_(block**-0.5).T
    return made.view(x.shape)


def rotate(x: Tensor, block: int, num_rotations: int = 1) -> Tensor:
    """``num_rotations`` block transforms of (..., K), between two of them every block meets every other.

    The exchange deals the columns of each block out over all blocks, so that two num_rotations spread one
    channel over ``block * block`` others with 2 log2(block) additions.
    """
    x = fwht(x, block)
    return fwht(_transpose_blocks(x, block), block) if num_rotations == 2 else x


def rotate_back(x: Tensor, block: int, num_rotations: int = 1) -> Tensor:
    """Inverse of :func:`rotate`."""
    x = fwht(x, block)
    return fwht(_transpose_blocks(x, x.shape[-1] // block), block) if num_rotations == 2 else x


def _transpose_blocks(x: Tensor, block: int) -> Tensor:
    """Columns read block by block, written column by column: the transpose of (K/block, block)."""
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
    state = (seed * 0x9E3779B97F4A7C15 + 1) & _MASK
    values = []
    for _ in range(columns):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        values.append(1.0 if (z ^ (z >> 31)) >> 63 else -1.0)
    return torch.tensor(values)
