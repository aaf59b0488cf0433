# SPDX-License-Identifier: Apache-2.0
"""Weight formats as numbers, for compiled decoders; ``common_ext/formats.h`` has the same ones."""

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
"""``Encoding`` of ``formats.h``: how stored codes become values."""

NO_SCALE, FLOAT32, BFLOAT16, E4M3, POWER = range(5)
"""``ScaleType`` of ``formats.h``."""


@dataclass(frozen=True)
class FormatCode:
    """How a weight format is decoded.

    Attributes:
        encoding: e.g. ``AFFINE``.
        bits: of a code.
        scale_type: e.g. ``FLOAT32``.
        offset: added to symmetric codes below 8 bits when they were stored.
        vector: weights per code.
        codebook: the values of ``TABLE`` where they are the same in every file, else empty.
    """

    encoding: int
    bits: int
    scale_type: int
    offset: int = 0
    vector: int = 1
    codebook: tuple[float, ...] = ()


def format_code(fmt: Format) -> FormatCode | None:
    """How the compiled decoders read a format; None for one that they do not support."""
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
            return FormatCode(TABLE, codebook.bits, scale, codebook=codebook.values)
        case NvFp4():
            return FormatCode(TABLE, 4, E4M3, codebook=E2M1.values)
        case MxFp4():
            return FormatCode(TABLE, 4, POWER, codebook=E2M1.values)
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


def decoded() -> list[str]:
    """Names of the formats that compiled libraries decode; GGUF's are left to torch."""
    return [name for name, fmt in FORMATS.items() if format_code(fmt) is not None]


def register_formats(register: Callable[..., None]) -> None:
    """Give every format of ``FORMATS`` to a library.

    Args:
        register: the library's function; it takes the arguments of ``register_format`` in
            ``common_ext/format_codes.h``.
    """
    for name, fmt in FORMATS.items():
        code = format_code(fmt)
        if code is not None:
            codebook = (ctypes.c_float * len(code.codebook))(*code.codebook)
            numbers = code.encoding, code.bits, code.offset, code.vector, code.scale_type
            register(name.encode(), *numbers, codebook, len(code.codebook))
