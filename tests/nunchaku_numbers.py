# SPDX-License-Identifier: Apache-2.0
"""Numbers that dtq and Nunchaku's own packer both pack; ``scripts/nunchaku_tiles.py`` hashes the latter."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

ASSET = Path(__file__).parent / "assets" / "nunchaku_tiles.json"
ROWS, COLUMNS, RANK = 256, 384, 32


def _integers(count: int, seed: int) -> Tensor:
    """Integers from 0 to 2^16, without a generator: those of torch may change."""
    x = torch.arange(count, dtype=torch.int64) + 1000 * seed
    for factor in (2654435761, 2246822519):
        x = (x ^ (x >> 7)) * factor & 0xFFFFFFFF
    return x >> 16


def _floats(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values in bfloat16 from 1/4 to 1; 128 of them in each octave."""
    values = _integers(torch.Size(shape).numel(), seed) % 384
    return (2.0 ** (values // 128 - 2) * (1 + values % 128 / 128) / 2).reshape(shape).bfloat16()


def numbers() -> dict[str, Tensor]:
    """What is packed, by name."""
    codes = _integers(ROWS * COLUMNS, 1) % 16
    return {
        "codes": (codes - 8).reshape(ROWS, COLUMNS).to(torch.int8),
        "scale": _floats((ROWS, COLUMNS // 64), 2),
        "vector": _floats((COLUMNS,), 3),
        "down": _floats((RANK, COLUMNS), 4),
        "up": _floats((ROWS, RANK), 5),
        "awq_codes": codes.flip(0).reshape(ROWS, COLUMNS).to(torch.int8),
        # powers of two: the packer divides the weight by them, and must find the codes again
        "awq_scale": (2.0 ** -(_integers(ROWS * COLUMNS // 64, 6) % 8))
        .reshape(ROWS, -1)
        .bfloat16(),
    }


def digest(tensor: Tensor) -> str:
    """Dtype, shape and SHA-256 of the bytes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
