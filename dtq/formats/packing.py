# SPDX-License-Identifier: Apache-2.0
"""Pack small integers into bytes: per row one stream of bits, lowest bit first.

With 4 bits, column 2i is the low nibble of byte i and column 2i + 1 the high one. With 2 bits, a
byte holds four codes. Codes of 3 and 6 bits cross byte boundaries. A row must end on a byte, so
there is no padding, and the packed shape tells the number of columns. Ternary codes can also be
packed five to a byte, in base 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtq.errors import InputError


def packed_width(name: str, columns: int, bits: int, vector: int = 1) -> int:
    """Bytes of a packed row.

    Args:
        name: of the format, for the message.
        columns: weights of a row.
        bits: bits of a code, 1 to 8.
        vector: columns that share a code.

    Returns:
        The number of bytes.

    Raises:
        InputError: the row would not end on a byte.
    """
    unit = vector * _codes_in_unit(bits)
    if columns % unit:
        raise InputError(
            f"{name} needs input features divisible by {unit}, got {columns}. "
            f"Use int8-row for this layer, or exclude it."
        )
    return columns // vector * bits // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes in [0, 2^bits), shape (N, C), into int8 bytes (N, C * bits / 8)."""
    num_codes, num_bytes, dtype = _unit(bits)
    shift = torch.arange(num_codes, device=codes.device, dtype=dtype) * bits
    units = codes.to(dtype).unflatten(-1, (-1, num_codes))  # (N, units, num_codes)
    word = (units << shift).sum(-1, dtype=dtype, keepdim=True)  # disjoint bits: a sum is an or
    position = torch.arange(num_bytes, device=codes.device, dtype=dtype) * 8
    return ((word >> position) & 255).flatten(-2).to(torch.uint8).view(torch.int8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`pack_bits`: uint8 codes (N, C)."""
    num_codes, num_bytes, dtype = _unit(bits)
    position = torch.arange(num_bytes, device=packed.device, dtype=dtype) * 8
    units = packed.view(torch.uint8).to(dtype).unflatten(-1, (-1, num_bytes))
    word = (units << position).sum(-1, dtype=dtype, keepdim=True)  # (N, units, 1)
    shift = torch.arange(num_codes, device=packed.device, dtype=dtype) * bits
    return ((word >> shift) & (2**bits - 1)).flatten(-2).to(torch.uint8)


def pack_trits(codes: Tensor) -> Tensor:
    """Pack codes in [0, 2], shape (N, 5 B), into int8 bytes (N, B), lowest digit first."""
    digit = 3 ** torch.arange(5, device=codes.device)
    return (codes.long().unflatten(-1, (-1, 5)) * digit).sum(-1).to(torch.uint8).view(torch.int8)


def unpack_trits(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_trits`: uint8 codes (N, 5 B) in [0, 2]."""
    digit = 3 ** torch.arange(5, device=packed.device, dtype=torch.int16)
    byte = packed.view(torch.uint8).to(torch.int16).unsqueeze(-1)
    return (byte // digit % 3).flatten(-2).to(torch.uint8)


def _codes_in_unit(bits: int) -> int:
    """The fewest codes that fill whole bytes."""
    return 8 // math.gcd(bits, 8)


def _unit(bits: int) -> tuple[int, int, torch.dtype]:
    """The smallest unit of whole bytes: its codes, its bytes, and a dtype that holds it."""
    num_codes = _codes_in_unit(bits)
    num_bytes = num_codes * bits // 8
    return num_codes, num_bytes, {1: torch.uint8, 3: torch.int32}.get(num_bytes, torch.int64)
