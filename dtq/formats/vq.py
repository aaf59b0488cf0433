# SPDX-License-Identifier: Apache-2.0
"""Vector quantization: ``vector`` consecutive weights of a row share one codeword.

As in VQ4DiT (2408.17131): 256 codewords of 4 weights are 2 bits per weight, 64 codewords of 2 are
3. The codebook of a layer is learned by k-means, here with squared errors weighted by
``column_weights``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dtq.errors import InputError
from dtq.formats.base import Clip, Format, PackedTensors, QParams, TensorSpec
from dtq.formats.groups import broadcast_weights, divide
from dtq.formats.packing import pack_bits, packed_width, unpack_bits

SAMPLE = 2**16
"""Number of vectors that a codebook is learned from; a random choice of them in larger matrices."""

_CHUNK = 2**10  # vectors whose distances to every codeword fit in the cache


@dataclass(frozen=True)
class Vq(Format):
    """A bfloat16 codebook of ``num_codewords`` vectors.

    Attributes:
        name: key of ``FORMATS``.
        num_codewords: a power of two.
        vector: weights per codeword.
        scaled: divide rows by their root mean square (stored as bfloat16) first.
    """

    name: str
    num_codewords: int
    vector: int = field()  # without this, Format.vector would be its default
    scaled: bool = False

    group = None
    data_dependent = True
    matrix_tensors = ("weight_lut",)

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Packed ``weight``, ``weight_lut`` (num_codewords, vector), maybe ``weight_scale``."""
        rows, columns = shape
        width = packed_width(self.name, columns, self._bits, self.vector)
        if rows * columns < 4 * self.num_codewords * self.vector:
            raise InputError(
                f"{self.name} needs at least {4 * self.num_codewords} vectors of {self.vector} "
                f"weights, else the codebook outweighs them; {rows} x {columns} has fewer. "
                f"Use int4-row for this layer, or exclude it."
            )
        specs = {
            "weight": TensorSpec((rows, width), torch.int8),
            "weight_lut": TensorSpec((self.num_codewords, self.vector), torch.bfloat16),
        }
        if self.scaled:
            specs["weight_scale"] = TensorSpec((rows, 1), torch.bfloat16)
        return specs

    def _fit(self, x: Tensor, weights: Tensor | None, clip: Clip, outer: QParams | None) -> QParams:
        params = {}
        power = x.new_ones((len(x), 1))  # of a row, in units of the squared scale
        if self.scaled:
            params["weight_scale"] = x.square().mean(1, keepdim=True).sqrt().to(torch.bfloat16)
            power = params["weight_scale"].float().square()
        vectors = self.split(x, params).flatten(0, 1)
        sample = torch.arange(len(vectors))
        if len(sample) > SAMPLE:
            shuffled = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))
            sample = shuffled[:SAMPLE]
        sample = sample.to(x.device)
        columns = broadcast_weights(x, weights).reshape(-1, self.vector)
        weight = columns[sample % len(columns)] * power[sample // len(columns)]
        codebook = kmeans(vectors[sample], weight, self.num_codewords)
        return {"weight_lut": codebook.to(torch.bfloat16), **params}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        """Nearest representable values, float32; see :meth:`Format.fake_quantize`."""
        return self._decode(self._encode(x, qparams), qparams)

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        """Packed codes of ``x`` (N, K), and the parameters as they are."""
        return {"weight": pack_bits(self._encode(x, qparams), self._bits), **qparams}

    def unpack(self, tensors: PackedTensors) -> Tensor:
        """The float32 matrix (N, K) that packed tensors represent."""
        return self._decode(self.codes(tensors), tensors)

    def codes(self, tensors: PackedTensors) -> Tensor:
        """The code of each vector, uint8 (N, K / vector)."""
        return unpack_bits(tensors["weight"], self._bits)

    def with_codes(self, tensors: PackedTensors, codes: Tensor) -> PackedTensors:
        """The packed tensors with other codes, integers (N, K / vector); the codebook stays."""
        return {**tensors, "weight": pack_bits(codes, self._bits)}

    def split(self, x: Tensor, qparams: QParams) -> Tensor:
        """The vectors (N, K / vector, vector) of a matrix (N, K), rows divided by their scale."""
        x = x.float()
        if self.scaled:
            x = divide(x, qparams["weight_scale"].float())
        return x.unflatten(1, (-1, self.vector))

    def join(self, vectors: Tensor, qparams: QParams) -> Tensor:
        """Inverse of :meth:`split`."""
        x = vectors.flatten(1)
        return x * qparams["weight_scale"].float() if self.scaled else x

    @property
    def _bits(self) -> int:
        return int(math.log2(self.num_codewords))

    def _encode(self, x: Tensor, qparams: QParams) -> Tensor:
        vectors = self.split(x, qparams).flatten(0, 1)  # (S, vector)
        return nearest_codewords(vectors, qparams["weight_lut"].float()).reshape(len(x), -1)

    def _decode(self, codes: Tensor, qparams: QParams) -> Tensor:
        return self.join(qparams["weight_lut"].float()[codes.int()], qparams)


def nearest_codewords(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index (M,) of the codeword (k, d) nearest to each vector (M, d)."""
    # float64: |c|^2 - 2xc cancels, and every codeword must be nearest to itself
    codebook = codebook.double()
    norms = codebook.square().sum(1)
    chunks = vectors.split(_CHUNK)
    # min is faster than argmin, and takes the first of equals, too
    distances = (torch.addmm(norms, v.double(), codebook.T, alpha=-2) for v in chunks)
    return torch.cat([d.min(1).indices for d in distances])


def kmeans(vectors: Tensor, weight: Tensor, k: int, *, steps: int = 25, seed: int = 0) -> Tensor:
    """Learn a codebook: k-means++ (Arthur & Vassilvitskii, 2007), then Lloyd's steps.

    The weights move the codewords, but a vector always belongs to the codeword that is nearest
    without weights, because that is how it will be encoded. A codeword without vectors moves to
    the vector with the largest error.

    Args:
        vectors: float32 (M, d).
        weight: weight of each squared error (M, d).
        k: codewords.
        steps: Lloyd's steps at most; they end when no codeword moves.
        seed: of the start.

    Returns:
        The codebook, float32 (k, d).
    """
    codebook = _kmeans_plus_plus(vectors, weight, k, seed)
    for _ in range(steps):
        index = nearest_codewords(vectors, codebook)
        zeros = torch.zeros_like(codebook, dtype=torch.float64)
        mass = zeros.index_add(0, index, weight.double())
        total = zeros.index_add(0, index, (weight * vectors).double())
        moved = torch.where(mass > 0, total / mass, codebook.double()).float()
        empty = (torch.bincount(index, minlength=k) == 0).nonzero().flatten()
        if len(empty):
            error = (weight * (vectors - moved[index]).square()).sum(1)
            moved[empty] = vectors[error.topk(len(empty)).indices]
        if torch.equal(moved, codebook):
            break
        codebook = moved
    return codebook


def _kmeans_plus_plus(vectors: Tensor, weight: Tensor, k: int, seed: int) -> Tensor:
    """Choose k vectors, each with a probability proportional to its error.

    The first is chosen with a probability proportional to its weight.
    """
    draws = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probability = weight.mean(1)
    chosen = []
    error = torch.full_like(probability, torch.inf)
    for draw in draws.tolist():
        total = probability.double().cumsum(0)
        index = torch.searchsorted(total, draw * total[-1:]).clamp(max=len(vectors) - 1)
        chosen.append(vectors[index])  # (1, d)
        error = torch.minimum(error, (weight * (vectors - chosen[-1]).square()).sum(1))
        probability = error
    return torch.cat(chosen)
