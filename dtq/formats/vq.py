# SPDX-License-Identifier: Apache-2.0
"""Vector quantization: each run of ``vector`` weights of a row is a word of the layer's codebook.

As in VQ4DiT (2408.17131): 256 words of 4 are 2 bits a weight, 64 words of 2 are 3. Words
are learned by k-means, here with the error of each column weighted by its column_weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.errors import InputError
from dtq.formats.base import PackedTensors, QParams, TensorSpec, broadcast_weights, divide
from dtq.formats.packing import pack_bits, packed_width, unpack_bits

SAMPLE = 2**16
"""Vectors that a codebook is learned from; a random choice of them in larger matrices."""

_CHUNK = 2**10  # vectors whose distances to every word are in the cache at once


@dataclass(frozen=True)
class Vq:
    """``words`` codewords of ``vector`` weights, the codebook in bfloat16.

    Attributes:
        scaled: rows are divided by their root mean square (bfloat16) first.
    """

    name: str
    words: int
    vector: int
    scaled: bool = False

    group = None
    data_dependent = True

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        width = packed_width(self.name, columns, self._bits, self.vector)
        if rows * columns < 4 * self.words * self.vector:
            raise InputError(
                f"{self.name} needs at least {4 * self.words} vectors of {self.vector} weights, "
                f"else the codebook outweighs them; {rows} x {columns} has fewer. "
                f"Use int4-row for this layer, or keep it."
            )
        parts = {
            "weight": TensorSpec((rows, width), torch.int8),
            "weight_lut": TensorSpec((self.words, self.vector), torch.bfloat16),
        }
        if self.scaled:
            parts["weight_scale"] = TensorSpec((rows, 1), torch.bfloat16)
        return parts

    def compute_qparams(
        self,
        x: Tensor,
        column_weights: Tensor | None = None,
        *,
        clip: Tensor | float = 1.0,
        outer: QParams | None = None,
    ) -> QParams:
        if outer is not None:
            return outer
        x = x.float()
        params = {}
        power = x.new_ones((len(x), 1))
        if self.scaled:
            params["weight_scale"] = x.square().mean(1, keepdim=True).sqrt().to(torch.bfloat16)
            power = params["weight_scale"].float().square()
        vectors = self.split(x, params).flatten(0, 1)
        pick = torch.arange(len(vectors))
        if len(pick) > SAMPLE:
            shuffled = torch.randperm(len(pick), generator=torch.Generator().manual_seed(0))
            pick = shuffled[:SAMPLE]
        pick = pick.to(x.device)
        columns = broadcast_weights(x, column_weights).reshape(-1, self.vector)
        weight = columns[pick % len(columns)] * power[pick // len(columns)]
        words = kmeans(vectors[pick], weight, self.words)
        return {"weight_lut": words.to(torch.bfloat16), **params}

    def fake_quantize(self, x: Tensor, qparams: QParams, cols: slice | None = None) -> Tensor:
        return self._values(self._nearest(x, qparams), qparams)

    def pack(self, x: Tensor, qparams: QParams) -> PackedTensors:
        return {"weight": pack_bits(self._nearest(x, qparams), self._bits), **qparams}

    def unpack(self, tensors: PackedTensors) -> Tensor:
        return self._values(self.codes(tensors), tensors)

    def codes(self, tensors: PackedTensors) -> Tensor:
        """The word of each vector, uint8 (N, K / vector)."""
        return unpack_bits(tensors["weight"], self._bits)

    def with_codes(self, tensors: PackedTensors, codes: Tensor) -> PackedTensors:
        """The parts with other words, integers (N, K / vector); the codebook stays."""
        return {**tensors, "weight": pack_bits(codes, self._bits)}

    def split(self, x: Tensor, qparams: QParams) -> Tensor:
        """The vectors (N, K / vector, vector) of a matrix (N, K), rows over their scale if any."""
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
        return int(math.log2(self.words))

    def _nearest(self, x: Tensor, qparams: QParams) -> Tensor:
        vectors = self.split(x, qparams).flatten(0, 1)  # (S, vector)
        return nearest_words(vectors, qparams["weight_lut"].float()).reshape(len(x), -1)

    def _values(self, codes: Tensor, qparams: QParams) -> Tensor:
        return self.join(qparams["weight_lut"].float()[codes.int()], qparams)


def nearest_words(vectors: Tensor, words: Tensor) -> Tensor:
    """Index of the nearest of ``words`` (k, d) to each of ``vectors`` (M, d)."""
    # float64: |c|^2 - 2xc cancels, and a word must be its own nearest
    words = words.double()
    norms = words.square().sum(1)
    chunks = vectors.split(_CHUNK)
    # min, which is faster than argmin and takes the first of equals too
    distances = (torch.addmm(norms, v.double(), words.T, alpha=-2) for v in chunks)
    return torch.cat([d.min(1).indices for d in distances])


def kmeans(vectors: Tensor, weight: Tensor, k: int, *, steps: int = 25, seed: int = 0) -> Tensor:
    """Codebook (k, d) of ``vectors`` (M, d): k-means++ (Arthur 2007), then Lloyd's steps.

    ``weight`` (M, d) weighs squared errors, so it moves the words; a vector always belongs to the
    word that is nearest without weights, because that is how it will be coded. A word without
    vectors moves to the vector with the largest error.
    """
    words = _spread_out(vectors, weight, k, seed)
    for _ in range(steps):
        index = nearest_words(vectors, words)
        mass = words.new_zeros(words.shape, dtype=torch.float64).index_add_(
            0, index, weight.double()
        )
        total = torch.zeros_like(mass).index_add_(0, index, (weight * vectors).double())
        moved = torch.where(mass > 0, total / mass, words.double()).float()
        empty = (torch.bincount(index, minlength=k) == 0).nonzero().flatten()
        if len(empty):
            error = (weight * (vectors - moved[index]).square()).sum(1)
            moved[empty] = vectors[error.topk(len(empty)).indices]
        if torch.equal(moved, words):
            break
        words = moved
    return words


def _spread_out(vectors: Tensor, weight: Tensor, k: int, seed: int) -> Tensor:
    """k vectors, each drawn with a chance that grows with its error under those before."""
    draws = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chance = weight.mean(1)
    chosen = []
    error = torch.full_like(chance, torch.inf)
    for draw in draws.tolist():
        running = chance.double().cumsum(0)
        at = torch.searchsorted(running, draw * running[-1:]).clamp(max=len(vectors) - 1)
        chosen.append(vectors[at])  # (1, d)
        error = torch.minimum(error, (weight * (vectors - chosen[-1]).square()).sum(1))
        chance = error
    return torch.cat(chosen)
