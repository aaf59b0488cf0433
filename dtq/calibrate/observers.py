# SPDX-License-Identifier: Apache-2.0
"""What calibration remembers of an input: extrema, moments, second moment, a sample of rows.

Everything is streamed and mergeable. Law: seeing A and then B equals merging what saw A with what
saw B. To keep it, which rows are sampled depends on where a row comes from (:class:`Origin`) and
never on what was seen before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleOrigin:
    """Where a batch of rows comes from.

    Attributes:
        bin: timestep bin of every row.
        call: number of the model call, by its batch and its place there.
        branch: per row, 1 for the unconditional half of a guided batch, else 0; int64 (rows,).
    """

    bin: int
    call: int
    branch: Tensor


class Observer(Protocol):
    """One accumulator over the rows of an input."""

    def observe(self, rows: Tensor, origin: SampleOrigin) -> None:
        """Take in float rows (R, K)."""

    def merge(self, other: Self) -> None:
        """Take in what another accumulator of the same kind saw.

        Not in place: a tensor that was read from a file keeps all of it mapped.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Everything remembered, by name."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""


class ChannelStats:
    """Per timestep bin and channel: minimum, maximum, sum, sum of squares; per bin: rows.

    Tensors: ``low, high, total, square`` float32 (bins, K); ``rows`` int64 (bins,).
    """

    def __init__(self, columns: int, bins: int) -> None:
        self.low = torch.full((bins, columns), torch.inf)
        self.high = torch.full((bins, columns), -torch.inf)
        self.total = torch.zeros(bins, columns, dtype=torch.float64)
        self.square = torch.zeros(bins, columns, dtype=torch.float64)
        self.rows = torch.zeros(bins, dtype=torch.int64)

    def observe(self, rows: Tensor, origin: SampleOrigin) -> None:
        b = origin.bin
        low, high = rows.amin(0).cpu(), rows.amax(0).cpu()
        self.low[b] = torch.minimum(self.low[b], low)
        self.high[b] = torch.maximum(self.high[b], high)
        self.total[b] += rows.sum(0, dtype=torch.float64).cpu()
        self.square[b] += rows.square().sum(0, dtype=torch.float64).cpu()
        self.rows[b] += len(rows)

    def merge(self, other: Self) -> None:
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)
        self.total = self.total + other.total
        self.square = self.square + other.square
        self.rows = self.rows + other.rows

    def tensors(self) -> dict[str, Tensor]:
        return {k: getattr(self, k) for k in ("low", "high", "total", "square", "rows")}

    def load(self, tensors: dict[str, Tensor]) -> None:
        for key in self.tensors():
            setattr(self, key, tensors[key])

    def amax(self) -> Tensor:
        """Largest magnitude per bin and channel, float32 (bins, K); empty bins are left out."""
        peaks = torch.maximum(self.low.abs(), self.high.abs())
        return peaks[self.rows > 0]

    def mean(self) -> Tensor:
        """Mean over all rows, float32 (K,)."""
        mean: Tensor = self.total.sum(0) / self.rows.sum().clamp(min=1)
        return mean.float()


HESSIAN_ROWS = 512
"""Rows of a call that count in the second moment."""


class HessianObserver:
    """Second moment: the sum of ``rows.T @ rows`` over a sample of rows, and how many.

    At most ``per_call`` rows of a call count, evenly spaced, so the cost stays below that of the
    layer itself. Tensors: ``hessian`` float32 (K, K), ``count`` int64 (1,).
    """

    def __init__(self, columns: int, per_call: int = HESSIAN_ROWS) -> None:
        self.per_call = per_call
        self.hessian = torch.zeros(columns, columns)
        self.count = torch.zeros(1, dtype=torch.int64)

    def observe(self, rows: Tensor, origin: SampleOrigin) -> None:
        sample = rows[_spread(len(rows), self.per_call, origin.call)].float()
        self.hessian = self.hessian.to(rows.device).addmm_(sample.T, sample)
        self.count += len(sample)

    def merge(self, other: Self) -> None:
        self.hessian = self.hessian + other.hessian.to(self.hessian)
        self.count = self.count + other.count

    def tensors(self) -> dict[str, Tensor]:
        return {"hessian": self.hessian.cpu(), "count": self.count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.hessian, self.count = tensors["hessian"], tensors["count"]

    def second_moment(self) -> Tensor:
        """E[x^T x], float32 (K, K)."""
        return self.hessian / self.count.clamp(min=1).to(self.hessian)


class InputSample:
    """A sample of rows, the same number for every timestep bin and guidance branch.

    A row keeps its place by a hash of where it comes from (bottom-k sampling): each stratum holds
    the rows with the smallest keys, so samples of parts merge into the sample of the whole.
    Tensors: ``rows`` float32 (R, K); ``key`` int64 (R,); ``stratum`` int64 (R,).
    """

    def __init__(self, columns: int, bins: int, capacity: int | None = None) -> None:
        if capacity is None:  # about 16 MB a site, at most 4096 rows
            capacity = max(256, min(4096, 2**22 // columns))
        self.per_stratum = max(1, capacity // (2 * bins))
        self.rows = torch.empty(0, columns)
        self.key = torch.empty(0, dtype=torch.int64)
        self.stratum = torch.empty(0, dtype=torch.int64)

    def observe(self, rows: Tensor, origin: SampleOrigin) -> None:
        key = _hash(origin.call * 1_000_003 + torch.arange(len(rows)))
        stratum = origin.bin * 2 + origin.branch
        # a call can add at most a stratum's worth: choose before copying rows off the device
        keep = _smallest(key, stratum, self.per_stratum)
        self._add(rows[keep.to(rows.device)].float().cpu(), key[keep], stratum[keep])

    def merge(self, other: Self) -> None:
        self._add(other.rows, other.key, other.stratum)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "key": self.key, "stratum": self.stratum}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.rows, self.key, self.stratum = (tensors[k] for k in ("rows", "key", "stratum"))

    def _add(self, rows: Tensor, key: Tensor, stratum: Tensor) -> None:
        key, stratum = torch.cat([self.key, key]), torch.cat([self.stratum, stratum])
        keep = _smallest(key, stratum, self.per_stratum)
        self.rows = torch.cat([self.rows, rows])[keep]
        self.key, self.stratum = key[keep], stratum[keep]


OBSERVERS = {"channels": ChannelStats, "hessian": HessianObserver, "sample": InputSample}
"""What a site can remember, by the name that methods ask for it."""


class InputStats:
    """The accumulators of one site (linears that share an input)."""

    def __init__(self, columns: int, bins: int, wanted: frozenset[str]) -> None:
        self.columns, self.bins = columns, bins
        self.channels = ChannelStats(columns, bins)
        self.hessian = HessianObserver(columns) if "hessian" in wanted else None
        self.sample = InputSample(columns, bins) if "sample" in wanted else None

    @staticmethod
    def nbytes(columns: int, bins: int, wanted: frozenset[str]) -> int:
        """What a site takes in memory when all is seen."""
        rows = max(256, min(4096, 2**22 // columns)) if "sample" in wanted else 0
        hessian = columns**2 if "hessian" in wanted else 0
        return 4 * (hessian + rows * columns) + 24 * bins * columns

    def observe(self, rows: Tensor, origin: SampleOrigin) -> None:
        """Take in float rows (R, K) of any float dtype; rows are read as float32."""
        for stat in self._stats().values():
            stat.observe(rows.float(), origin)

    def merge(self, other: InputStats) -> None:
        theirs = other._stats()
        for name, stat in self._stats().items():
            stat.merge(theirs[name])  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, stat in self._stats().items()
            for key, tensor in stat.tensors().items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Inverse of :meth:`tensors`."""
        wanted = frozenset(key.split(".")[0] for key in tensors)
        bins, columns = tensors["channels.low"].shape
        stats = cls(columns, bins, wanted)
        for name, stat in stats._stats().items():
            prefix = f"{name}."
            stat.load(
                {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            )
        return stats

    def _stats(self) -> dict[str, ChannelStats | HessianObserver | InputSample]:
        every = {"channels": self.channels, "hessian": self.hessian, "sample": self.sample}
        return {name: stat for name, stat in every.items() if stat is not None}


def _spread(total: int, wanted: int, call: int) -> slice:
    """At most ``wanted`` of ``total`` rows, evenly spaced, the phase moving with the call."""
    step = max(1, -(-total // wanted))
    return slice(call % step, None, step)


def _hash(values: Tensor) -> Tensor:
    """Scramble int64 values into 31-bit keys (xorshift-multiply, constants of Murmur3)."""
    x = values & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)) >> 1


def _smallest(key: Tensor, stratum: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` smallest keys of each stratum, in order of stratum, then key."""
    order = torch.argsort(stratum * 2**31 + key, stable=True)
    sorted_stratum = stratum[order]
    first = torch.searchsorted(sorted_stratum, sorted_stratum)
    return order[torch.arange(len(order)) - first < count]
