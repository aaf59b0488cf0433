# SPDX-License-Identifier: Apache-2.0
"""The interface of a number format, and what the formats share.

A format converts a float matrix (N, K) to named tensors and back. These *packed tensors* are the
parameters of the quantized layer and the entries of the checkpoint; nothing else is stored.

Laws, for every format ``f``, matrix ``x`` and ``p = f.compute_qparams(x)``:

1. ``f.unpack(f.pack(x, p))`` equals ``f.fake_quantize(x, p)`` bit for bit;
2. ``f.fake_quantize(f.fake_quantize(x, p), p)`` equals ``f.fake_quantize(x, p)``;
3. ``f.tensor_specs(x.shape)`` gives the exact names, shapes and dtypes of ``f.pack(x, p)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dtq.formats.groups import dequantize, divide, expand_groups, num_groups, scale_dtype
from dtq.formats.packing import pack_bits, packed_width, unpack_bits

QParams = dict[str, Tensor]
"""What ``compute_qparams`` returns: scales, zero points, codebooks, by name, as (N, groups), (N, 1)
or (1, ...). Values are already rounded to the dtype that is stored."""

PackedTensors = dict[str, Tensor]
"""The stored tensors, by name."""

Clip = Tensor | float
"""Fraction of the range to keep: a number, (N, 1) or (N, groups)."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one packed tensor.

    Attributes:
        shape: as stored.
        dtype: as stored.
        unsupported_reason: a function that takes a tensor of this shape and dtype, and returns
            why its values are invalid (no matrix packs to them), or None if they are valid.
            Without a function every value is valid. Kernels do not check values, so this is
            checked when a file is read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    unsupported_reason: Callable[[Tensor], str | None] | None = field(
        default=None, compare=False, repr=False
    )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Format(ABC):
    """How the numbers of a matrix are stored. Stateless: parameters are in ``QParams``.

    Attributes:
        name: number type, then granularity: ``int4-g64``. A key of ``FORMATS``.
        group: columns that share parameters; None when a whole row does.
        vector: columns that are quantized together; slices of the matrix hold whole vectors.
        data_dependent: ``compute_qparams`` minimizes an error over the data. Such a format uses
            ``column_weights`` and ignores ``clip``.
        matrix_tensors: packed tensors whose values all rows share, such as a codebook. They are
            stored once; or once per row, all equal. Every other packed tensor has values of its
            own for each row.
    """

    name: str
    group: int | None
    vector: int = 1
    data_dependent = False
    matrix_tensors: tuple[str, ...] = ()

    @abstractmethod
    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the packed tensors of a matrix of this shape (N, K).

        Raises:
            InputError: the shape does not fit the format (K is not a multiple of the group).
        """

    def compute_qparams(
        self,
        x: Tensor,
        column_weights: Tensor | None = None,
        *,
        clip: Clip = 1.0,
        outer: QParams | None = None,
    ) -> QParams:
        """Compute the parameters of ``x``.

        Args:
            x: float matrix (N, K), or a slice of whole groups of one.
            column_weights: weight of each column's squared error (K,), usually the diagonal of the
                Hessian. None: all columns count the same. Formats that do not minimize an error
                ignore it.
            clip: fraction of the range to keep. 1: nothing is clipped.
            outer: parameters of the whole matrix. Those of whole rows, or of the matrix, are taken
                from there and not computed again. Column solvers fit one group with it. Without
                groups it holds every parameter, so it is returned.

        Returns:
            The parameters, in the dtypes that are stored.
        """
        if outer is not None and self.group is None:
            return outer
        return self._fit(x.float(), column_weights, clip, outer)

    @abstractmethod
    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        """The parameters of float32 ``x``; see :meth:`compute_qparams`."""

    @abstractmethod
    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        """Round to the nearest representable values.

        Args:
            x: float (N, columns), columns ``cols`` of the matrix.
            qparams: parameters of the whole matrix.
            cols: None: ``x`` is the whole matrix.

        Returns:
            float32, the shape of ``x``.
        """

    @abstractmethod
    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        """The packed tensors of ``fake_quantize(x, qparams)``."""

    @abstractmethod
    def unpack(self, tensors: PackedTensors) -> Tensor:
        """The float32 matrix (N, K) that packed tensors represent."""

    def _packed_specs(
        self, shape: tuple[int, int], bits: int, scale: torch.dtype | None = None
    ) -> dict[str, TensorSpec]:
        """A packed weight of ``bits`` bits, and one scale per row or group."""
        rows, columns = shape
        groups = num_groups(self.name, columns, self.group)
        width = packed_width(self.name, columns, bits)
        return {
            "weight": TensorSpec((rows, width), torch.int8),
            "weight_scale": TensorSpec((rows, groups), scale or scale_dtype(self.group)),
        }


class CodebookFormat(Format):
    """``w = entry[code] * scale``: one packed code per weight, one scale per row or group.

    A subclass also says how many bits a code has.
    """

    bits: int

    @abstractmethod
    def _encode(self, u: Tensor, qparams: QParams) -> Tensor:
        """The code that is nearest to a number in units of the scale."""

    @abstractmethod
    def _decode(self, codes: Tensor, qparams: QParams) -> Tensor:
        """The number that a code stands for, in units of the scale."""

    def _round(self, u: Tensor, qparams: QParams) -> Tensor:
        return self._decode(self._encode(u, qparams), qparams)

    def _float_scale(self, scale: Tensor, qparams: QParams) -> Tensor:
        """A stored scale as float32."""
        return scale.float()

    def _column_scale(self, columns: int, qparams: QParams, cols: slice | None = None) -> Tensor:
        """Float scale of each column: (N, columns) or (N, 1)."""
        scale = expand_groups(qparams["weight_scale"], columns, self.group, cols)
        return self._float_scale(scale, qparams)

    def _pack_codes(self, codes: Tensor) -> PackedTensors:
        return {"weight": pack_bits(codes, self.bits)}

    def _unpack_codes(self, tensors: PackedTensors) -> Tensor:
        return unpack_bits(tensors["weight"], self.bits)

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        """Nearest representable values, float32; see :meth:`Format.fake_quantize`."""
        scale = self._column_scale(x.shape[1], qparams, cols)
        return self._round(divide(x.float(), scale), qparams) * scale

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        """Packed codes of ``x`` (N, K), and the parameters as they are."""
        u = divide(x.float(), self._column_scale(x.shape[1], qparams))
        return {**self._pack_codes(self._encode(u, qparams)), **qparams}

    def unpack(self, tensors: PackedTensors) -> Tensor:
        """The float32 matrix (N, K) that packed tensors represent."""
        entries = self._decode(self._unpack_codes(tensors), tensors)
        return dequantize(entries, self._float_scale(tensors["weight_scale"], tensors))


_CHUNK = 2**16  # weights per chunk: their intermediate copies stay in the cache


def fake_quantize_weight(fmt: Format, x: Tensor, qparams: QParams) -> Tensor:
    """``fmt.fake_quantize(x, qparams)`` in chunks of rows: several times as fast on a CPU.

    Args:
        fmt: any format. The rows of a data-dependent one share parameters, so it gets one chunk.
        x: float (N, K).
        qparams: parameters of ``x``.

    Returns:
        float32 (N, K).
    """
    rows = max(1, _CHUNK // max(1, x.shape[1]))
    if fmt.data_dependent or len(x) <= rows:
        return fmt.fake_quantize(x, qparams)
    out = torch.empty_like(x, dtype=torch.float32)
    for start in range(0, len(x), rows):
        chunk = slice(start, start + rows)
        chunk_params = {
            k: v[chunk] if v.ndim == 2 and len(v) == len(x) else v for k, v in qparams.items()
        }
        out[chunk] = fmt.fake_quantize(x[chunk], chunk_params)
    return out


def bits_per_weight(fmt: Format, shape: tuple[int, int]) -> float:
    """Stored bits of all packed tensors of a matrix (N, K), divided by its number of weights."""
    return 8 * sum(s.nbytes for s in fmt.tensor_specs(shape).values()) / math.prod(shape)
