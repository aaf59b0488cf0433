# SPDX-License-Identifier: Apache-2.0
"""The bytes of GGUF's blocks from dtq's tensors, and back; layouts of ggml (MIT), exact.

A block holds the scales and codes of 32 columns, or of a superblock of 256. ggml splits codes into
planes of bits, so that one vector instruction decodes 32 of them: in 2-bit planes byte j of a run
has columns j, j + 32, j + 64 and j + 96.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.formats import FORMATS, PackedTensors
from dtq.formats.gguf import SUPERBLOCK, KQuant
from dtq.formats.packing import pack_bits, unpack_bits


@dataclass(frozen=True)
class BlockType:
    """A quantized type of GGUF.

    Attributes:
        number: of the type in a file.
        columns: of a block.
        nbytes: of a block.
        to_blocks: bytes (blocks, nbytes) from the fields of :func:`_fields`.
        from_blocks: the inverse.
    """

    number: int
    columns: int
    nbytes: int
    to_blocks: Callable[[dict[str, Tensor]], Tensor]
    from_blocks: Callable[[Tensor], dict[str, Tensor]]


def to_blocks(name: str, tensors: PackedTensors) -> Tensor:
    """Bytes (N, K / columns * nbytes), uint8, of a weight in a format of GGUF.

    Args:
        name: key of ``BLOCK_TYPES`` and of ``FORMATS``.
        tensors: packed tensors of the format.
    """
    rows = len(tensors["weight"])
    fields = _fields(name, tensors)
    return BLOCK_TYPES[name].to_blocks(fields).reshape(rows, -1)


def from_blocks(name: str, data: Tensor) -> PackedTensors:
    """Inverse of :func:`to_blocks`.

    Args:
        name: key of ``BLOCK_TYPES``.
        data: uint8 (N, bytes).
    """
    kind, rows = BLOCK_TYPES[name], len(data)
    fields = kind.from_blocks(data.reshape(-1, kind.nbytes))
    fmt = FORMATS[name]
    bits = fmt.bits  # type: ignore[attr-defined]
    tensors = {
        "weight": pack_bits(fields["codes"].reshape(rows, -1), bits),
        "weight_scale": fields["d"].reshape(rows, -1),
    }
    if isinstance(fmt, KQuant):
        scales = {"weight_scale_2": "scales", "weight_min_2": "mins"}
        for key, field in scales.items():
            if field in fields:
                tensors[key] = pack_bits(fields[field].reshape(rows, -1), fmt.scale_bits)
        if fmt.minimum:
            tensors["weight_min"] = fields["dmin"].reshape(rows, -1)
    return tensors


def _fields(name: str, tensors: PackedTensors) -> dict[str, Tensor]:
    """Unsigned codes and integer scales, uint8 (blocks, ...), float16 scales (blocks, 1)."""
    fmt, kind = FORMATS[name], BLOCK_TYPES[name]
    bits = fmt.bits  # type: ignore[attr-defined]
    fields = {
        "codes": unpack_bits(tensors["weight"], bits).reshape(-1, kind.columns),
        "d": tensors["weight_scale"].reshape(-1, 1),
    }
    if isinstance(fmt, KQuant):
        groups = SUPERBLOCK // fmt.columns
        scales = unpack_bits(tensors["weight_scale_2"], fmt.scale_bits)
        fields["scales"] = scales.reshape(-1, groups)
        if fmt.minimum:
            mins = unpack_bits(tensors["weight_min_2"], fmt.scale_bits)
            fields |= {
                "dmin": tensors["weight_min"].reshape(-1, 1),
                "mins": mins.reshape(-1, groups),
            }
    return fields


def _half(scale: Tensor) -> Tensor:
    """Float16 (blocks, 1) as two bytes (blocks, 2)."""
    return scale.contiguous().view(torch.uint8)


def _float(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16)


def _planes(values: Tensor, bits: int, run: int) -> Tensor:
    """Codes (blocks, columns) as bytes: byte j of a run has columns j, j + run, ...

    The columns of a run are 8 / bits times ``run``.
    """
    count = 8 // bits
    shift = (torch.arange(count, dtype=torch.uint8) * bits).reshape(1, 1, count, 1)
    grouped = values.reshape(len(values), -1, count, run)
    return (grouped << shift).sum(2, dtype=torch.uint8).flatten(1)


def _from_planes(data: Tensor, bits: int, run: int) -> Tensor:
    """Inverse of :func:`_planes`."""
    count = 8 // bits
    shift = (torch.arange(count, dtype=torch.uint8) * bits).reshape(1, 1, count, 1)
    codes = data.reshape(len(data), -1, 1, run) >> shift & (2**bits - 1)
    return codes.flatten(1)


# ------------------------------------------------------------------------- blocks of 32 columns


def _q8_0(f: dict[str, Tensor]) -> Tensor:
    return torch.cat([_half(f["d"]), f["codes"] ^ 128], 1)  # raised by 128 in dtq's file


def _from_q8_0(b: Tensor) -> dict[str, Tensor]:
    return {"d": _float(b[:, :2]), "codes": b[:, 2:] ^ 128}


def _iq4_nl(f: dict[str, Tensor]) -> Tensor:
    return torch.cat([_half(f["d"]), _planes(f["codes"], 4, 16)], 1)


def _from_iq4_nl(b: Tensor) -> dict[str, Tensor]:
    return {"d": _float(b[:, :2]), "codes": _from_planes(b[:, 2:], 4, 16)}


# ------------------------------------------------------------------------------- superblocks


def _pack_scales(scales: Tensor, mins: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits (blocks, 8) in 12 bytes, as in ``q4_k`` and ``q5_k``."""
    low, low_min, high, high_min = scales[:, :4], mins[:, :4], scales[:, 4:], mins[:, 4:]
    first = low | (high >> 4 << 6)
    second = low_min | (high_min >> 4 << 6)
    return torch.cat([first, second, (high & 15) | (high_min << 4)], 1)


def _unpack_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], 1)
    return scales, torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], 1)


def _q4_k(f: dict[str, Tensor]) -> Tensor:
    scales = _pack_scales(f["scales"], f["mins"])
    return torch.cat([_half(f["d"]), _half(f["dmin"]), scales, _planes(f["codes"], 4, 32)], 1)


def _from_q4_k(b: Tensor) -> dict[str, Tensor]:
    scales, mins = _unpack_scales(b[:, 4:16])
    codes = _from_planes(b[:, 16:], 4, 32)
    return {
        "d": _float(b[:, :2]), "dmin": _float(b[:, 2:4]),
        "scales": scales, "mins": mins, "codes": codes,
    }  # fmt: skip


def _q5_k(f: dict[str, Tensor]) -> Tensor:
    scales = _pack_scales(f["scales"], f["mins"])
    high, low = _planes(f["codes"] >> 4, 1, 32), _planes(f["codes"] & 15, 4, 32)
    return torch.cat([_half(f["d"]), _half(f["dmin"]), scales, high, low], 1)


def _from_q5_k(b: Tensor) -> dict[str, Tensor]:
    scales, mins = _unpack_scales(b[:, 4:16])
    codes = _from_planes(b[:, 48:], 4, 32) | (_from_planes(b[:, 16:48], 1, 32) << 4)
    return {
        "d": _float(b[:, :2]), "dmin": _float(b[:, 2:4]),
        "scales": scales, "mins": mins, "codes": codes,
    }  # fmt: skip


def _q6_k(f: dict[str, Tensor]) -> Tensor:
    low, high = _planes(f["codes"] & 15, 4, 64), _planes(f["codes"] >> 4, 2, 32)
    return torch.cat([low, high, f["scales"] ^ 128, _half(f["d"])], 1)


def _from_q6_k(b: Tensor) -> dict[str, Tensor]:
    codes = _from_planes(b[:, :128], 4, 64) | (_from_planes(b[:, 128:192], 2, 32) << 4)
    return {"d": _float(b[:, 208:]), "scales": b[:, 192:208] ^ 128, "codes": codes}


def _q3_k(f: dict[str, Tensor]) -> Tensor:
    high, low = _planes(f["codes"] >> 2, 1, 32), _planes(f["codes"] & 3, 2, 32)
    scales = f["scales"]
    packed = [_planes(scales & 15, 4, 8), _planes(scales >> 4, 2, 4)]
    return torch.cat([high, low, *packed, _half(f["d"])], 1)


def _from_q3_k(b: Tensor) -> dict[str, Tensor]:
    codes = _from_planes(b[:, 32:96], 2, 32) | (_from_planes(b[:, :32], 1, 32) << 2)
    scales = _from_planes(b[:, 96:104], 4, 8) | (_from_planes(b[:, 104:108], 2, 4) << 4)
    return {"d": _float(b[:, 108:]), "scales": scales, "codes": codes}


def _q2_k(f: dict[str, Tensor]) -> Tensor:
    scales = f["scales"] | (f["mins"] << 4)
    return torch.cat([scales, _planes(f["codes"], 2, 32), _half(f["d"]), _half(f["dmin"])], 1)


def _from_q2_k(b: Tensor) -> dict[str, Tensor]:
    return {
        "scales": b[:, :16] & 15, "mins": b[:, :16] >> 4, "codes": _from_planes(b[:, 16:80], 2, 32),
        "d": _float(b[:, 80:82]), "dmin": _float(b[:, 82:84]),
    }  # fmt: skip


BLOCK_TYPES: dict[str, BlockType] = {
    "q8_0": BlockType(8, 32, 34, _q8_0, _from_q8_0),
    "q2_k": BlockType(10, 256, 84, _q2_k, _from_q2_k),
    "q3_k": BlockType(11, 256, 110, _q3_k, _from_q3_k),
    "q4_k": BlockType(12, 256, 144, _q4_k, _from_q4_k),
    "q5_k": BlockType(13, 256, 176, _q5_k, _from_q5_k),
    "q6_k": BlockType(14, 256, 210, _q6_k, _from_q6_k),
    "iq4_nl": BlockType(20, 32, 18, _iq4_nl, _from_iq4_nl),
}
"""By weight format of dtq."""
