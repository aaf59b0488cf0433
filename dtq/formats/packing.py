# SPDX-License-Identifier: Apache-2.0
"""Codes in bytes: a stream of bits, lowest first, that starts anew in each row.

With 4 bits column 2i is the low nibble of byte i and column 2i+1 the high one; 2 bits are four
codes a byte; 3 and 6 bits run across bytes. A row must end on a byte, so nothing is padded and the
packed shape says how many columns there are. Ternary codes also go five to a byte, in base 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtq.errors import InputError


def packed_width(name: str, columns: int, bits: int, vector: int = 1) -> int:
    """Bytes of a row of codes, one code per ``vector`` columns.

    Raises:
        InputError: the row would not end on a byte.
    """
    unit = vector * _codes_in_unit(bits)
    if columns % unit:
        raise InputError(
            f"{name} needs input features divisible by {unit}, got {columns}. "
            f"Use int8-row for this layer, or keep it."
        )
    return columns // vector * bits // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes in [0, 2^bits), shape (N, C), into int8 bytes (N, C * bits / 8)."""
    per, count, dtype = _unit(bits)
    shift = torch.arange(per, device=codes.device, dtype=dtype) * bits
    units = codes.to(dtype).unflatten(-1, (-1, per))  # (N, units, per)
    word = (units << shift).sum(-1, dtype=dtype, keepdim=True)  # disjoint bits: a sum is an or
    position = torch.arange(count, device=codes.device, dtype=dtype) * 8
    return ((word >> position) & 255).flatten(-2).to(torch.uint8).view(torch.int8)


def unpack_bits(packed: Tensor, bits: int, columns: int | None = None) -> Tensor:
    """Inverse of :func:`pack_bits`: uint8 codes (N, C); ``columns`` cuts the row shorter."""
    per, count, dtype = _unit(bits)
    position = torch.arange(count, device=packed.device, dtype=dtype) * 8
    units = packed.view(torch.uint8).to(dtype).unflatten(-1, (-1, count))  # (N, units, count)
    word = (units << position).sum(-1, dtype=dtype, keepdim=True)
    shift = torch.arange(per, device=packed.device, dtype=dtype) * bits
    codes = ((word >> shift) & (2**bits - 1)).flatten(-2).to(torch.uint8)
    return codes if columns is None else codes[..., :columns]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes in [0, 15], shape (N, K) with K even, into int8 bytes (N, K/2)."""
    return pack_bits(codes, 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_nibbles`: int8 bytes (N, K/2) to int8 codes (N, K) in [0, 15]."""
    return unpack_bits(packed, 4).view(torch.int8)


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
    """Codes in the smallest whole-byte unit, its bytes, and an integer that holds it."""
    per = _codes_in_unit(bits)
    count = per * bits // 8
    return per, count, {1: torch.uint8, 3: torch.int32}.get(count, torch.int64)
