# SPDX-License-Identifier: Apache-2.0
"""What a format is to a compiled decoder.

The numbers are those of ``common_ext/formats.h``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from dtq.formats import FORMATS, Format
from dtq.formats.floats import Fp8, MxFp4, NvFp4
from dtq.formats.grid import E2M1, Grid
from dtq.formats.integer import Int, TwoLevelInt
from dtq.formats.lut import Lut
from dtq.formats.ternary import Ternary
from dtq.formats.vq import Vq

AFFINE, TABLE, FLOAT8, WORDS, TRITS, TWO_LEVEL = range(6)
"""``Encoding``."""

NO_SCALE, FLOAT32, BFLOAT16, E4M3, POWER = range(5)
"""``ScaleType``."""


@dataclass(frozen=True)
class FormatCode:
    """How the codes of a format become numbers.

    Attributes:
        offset: what symmetric codes below 8 bits were raised by.
        vector: weights of a code.
        levels: of a table that is the same in every file.
    """

    codes: int
    bits: int
    scale: int
    offset: int = 0
    vector: int = 1
    levels: tuple[float, ...] = ()


def format_code(fmt: Format) -> FormatCode | None:
    """The spelling of a format; None for one that the decoder does not know."""
    scale = FLOAT32 if fmt.group is None else BFLOAT16
    match fmt:
        case Int(bits=bits, asymmetric=asymmetric):
            offset = 0 if asymmetric or bits == 8 else 2 ** (bits - 1)
            return FormatCode(AFFINE, bits, scale, offset)
        case TwoLevelInt(bits=bits):
            return FormatCode(TWO_LEVEL, bits, FLOAT32)
        case Fp8():
            return FormatCode(FLOAT8, 8, FLOAT32)
        case Grid(codebook=codebook):
            return FormatCode(TABLE, codebook.bits, scale, levels=codebook.values)
        case NvFp4():
            return FormatCode(TABLE, 4, E4M3, levels=E2M1.values)
        case MxFp4():
            return FormatCode(TABLE, 4, POWER, levels=E2M1.values)
        case Lut(bits=bits):
            return FormatCode(TABLE, bits, scale)
        case Vq(num_codewords=num_codewords, vector=vector, scaled=scaled):
            bits = num_codewords.bit_length() - 1
            return FormatCode(WORDS, bits, BFLOAT16 if scaled else NO_SCALE, vector=vector)
        case Ternary(trits=True):
            return FormatCode(TRITS, 2, scale, 1)
        case Ternary():
            return FormatCode(AFFINE, 2, scale, 1)
    return None


def register_formats(say: Callable[..., None]) -> None:
    """Spell every format of the table to a library, by its function that takes one."""
    for name, fmt in FORMATS.items():
        found = format_code(fmt)
        if found is not None:
            levels = (ctypes.c_float * len(found.levels))(*found.levels)
            numbers = found.codes, found.bits, found.offset, found.vector, found.scale
            say(name.encode(), *numbers, levels, len(found.levels))
