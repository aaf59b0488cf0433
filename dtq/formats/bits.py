# SPDX-License-Identifier: Apache-2.0
"""Two nibbles in a byte. Column 2i is the low nibble of byte i, column 2i+1 the high one."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack int codes in [0, 15], shape (N, K) with K even, into int8 bytes (N, K/2)."""
    low, high = codes[:, 0::2].to(torch.uint8), codes[:, 1::2].to(torch.uint8)
    return (low | (high << 4)).view(torch.int8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_nibbles`: int8 bytes (N, K/2) to int8 codes (N, K) in [0, 15]."""
    byte = packed.view(torch.uint8)
    return torch.stack((byte & 15, byte >> 4), dim=-1).flatten(-2).to(torch.int8)
