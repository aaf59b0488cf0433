# SPDX-License-Identifier: Apache-2.0
"""Observers of a layer's input: extrema, mean, Hessian, a sample of rows.

Everything is streamed and mergeable. Law: observing A and then B equals merging an observer of A
with an observer of B. To keep it, which rows are sampled depends on where a row comes from
(:class:`SampleOrigin`) and never on earlier rows.

An observer is one accumulator over the rows of an input; a row is one token. It adds rows
(``observe``) or those of another observer of the same kind (``merge``), and gives its state by name
(``tensors``) and takes it back (``load``). Merging is not in place: a tensor that was read from a
file keeps the whole file mapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleOrigin:
    """Where a batch of rows comes from.

    Attributes:
        bin: timestep bin of every row.
        call: number of the model call, by its batch and its position there.
        branch: per row, 1 for the unconditional half of a guided batch, else 0; int64 (rows,).
    """

    bin: int
    call: int
    branch: Tensor


class ChannelStats:
    """Per timestep bin and channel: minimum, maximum, sum, sum of squares; per bin: rows.

    Tensors: ``low, high`` float32 and ``total, square`` float64 (bins, K); ``rows`` int64 (bins,).
    """

    def __init__(self, columns: int, bins: int) -> None:
        self.low = torch.full((bins, columns), torch.inf)
        self.high = torch.full((bins, columns), -torch.inf)
        self.total = torch.zeros(bins, columns, dtype=torch.float64)
        self.square = torch.zeros(bins, columns, dtype=torch.float64)
        self.rows = torch.zeros(bins, dtype=torch.int64)

    def observe(self, rows: Tensor, origin: SampleOrigin) -> None:
        """Add float rows (R, K)."""
        b = origin.bin
        low, high = rows.amin(0).cpu(), rows.amax(0).cpu()
        self.low[b] = torch.minimum(self.low[b], low)
        self.high[b] = torch.maximum(self.high[b], high)
        self.total[b] += rows.sum(0, dtype=torch.float64).cpu()
        self.square[b] += rows.square().sum(0, dtype=torch.float64).cpu()
        self.rows[b] += len(rows)

    def merge(self, other: Self) -> None:
        """Add the rows of another observer."""
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)
        self.total = self.total + other.total
        self.square = self.square + other.square
        self.rows = self.rows + other.rows

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {k: getattr(self, k) for k in ("low", "high", "total", "square", "rows")}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        for key in self.tensors():
            setattr(self, key, tensors[key])

    def amax(self) -> Tensor:
        """Largest magnitude per bin and channel, float32 (bins, K); empty bins are left out."""
        return torch.maximum(self.low.abs(), self.high.abs())[self.rows > 0]

    def mean(self) -> Tensor:
        """Mean over all rows, float32 (K,)."""
        mean: Tensor = self.total.sum(0) / self.rows.sum().clamp(min=1)
        return mean.float()


HESSIAN_ROWS = 512
"""Rows of a call that count in the Hessian."""


class HessianObserver:
    """Hessian of the layer's squared output error, up to a factor: ``X^T X`` of sampled rows.

    At most ``per_call`` rows of a call count, evenly spaced, so that the cost stays below that of
    the layer itself. Tensors: ``hessian`` float32 (K, K), ``count`` int64 (1,), the rows summed.

    Args:
        columns: K.
        per_call: rows.
    """

    def __init__(self, columns: int, per_call: int = HESSIAN_ROWS) -> None:
        self.per_call = per_call
        self.total = torch.zeros(columns, columns)
        self.count = torch.zeros(1, dtype=torch.int64)

    def observe(self, rows: Tensor, origin: SampleOrigin) -> None:
        """Add float rows (R, K)."""
        sample = rows[_evenly_spaced(len(rows), self.per_call, origin.call)].float()
        self.total = self.total.to(rows.device).addmm_(sample.T, sample)
        self.count += len(sample)

    def merge(self, other: Self) -> None:
        """Add the rows of another observer."""
        self.total = self.total + other.total.to(self.total)
        self.count = self.count + other.count

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {"hessian": self.total.cpu(), "count": self.count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        self.total, self.count = tensors["hessian"], tensors["count"]

    def hessian(self) -> Tensor:
        """H = E[x^T x], float32 (K, K)."""
        return self.total / self.count.clamp(min=1).to(self.total)


class InputSample:
    """A sample of rows, the same number for every timestep bin and guidance branch.

    The key of a row is a hash of where it comes from (bottom-k sampling): each stratum holds the
    rows with the smallest keys, so the samples of shards merge into the sample of the whole.
    Tensors: ``rows`` float32 (R, K); ``key`` int64 (R,); ``stratum`` int64 (R,).

    Args:
        columns: K.
        bins: timestep bins; there are two strata per bin.
        capacity: rows over all strata; default: about 16 MB, at most 4096 rows.
    """

    def __init__(self, columns: int, bins: int, capacity: int | None = None) -> None:
        capacity = _capacity(columns) if capacity is None else capacity
        self.per_stratum = max(1, capacity // (2 * bins))
        self.rows = torch.empty(0, columns)
        self.key = torch.empty(0, dtype=torch.int64)
        self.stratum = torch.empty(0, dtype=torch.int64)

    def observe(self, rows: Tensor, origin: SampleOrigin) -> None:
        """Add float rows (R, K)."""
        key = _hash(origin.call * 1_000_003 + torch.arange(len(rows)))
        stratum = origin.bin * 2 + origin.branch
        # a call adds at most the rows of one stratum: select before copying rows off the device
        keep = _smallest(key, stratum, self.per_stratum)
        self._add(rows[keep.to(rows.device)].float().cpu(), key[keep], stratum[keep])

    def merge(self, other: Self) -> None:
        """Add the rows of another observer."""
        self._add(other.rows, other.key, other.stratum)

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {"rows": self.rows, "key": self.key, "stratum": self.stratum}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        self.rows, self.key, self.stratum = (tensors[k] for k in ("rows", "key", "stratum"))

    def _add(self, rows: Tensor, key: Tensor, stratum: Tensor) -> None:
        key, stratum = torch.cat([self.key, key]), torch.cat([self.stratum, stratum])
        keep = _smallest(key, stratum, self.per_stratum)
        self.rows = torch.cat([self.rows, rows])[keep]
        self.key, self.stratum = key[keep], stratum[keep]


OBSERVERS = {"channels": ChannelStats, "hessian": HessianObserver, "sample": InputSample}
"""Observers by the name that methods ask for."""


OUTPUT_NEEDS = frozenset({"hessian"})
"""What is observed of the gradients with respect to the output of a linear, as of an input."""


class InputStats:
    """The observers of one input group (linears that share an input).

    Args:
        columns: K, the channels of the input.
        bins: timestep bins.
        needs: names of :data:`OBSERVERS`; channel statistics are always there.
    """

    def __init__(self, columns: int, bins: int, needs: frozenset[str]) -> None:
        self.columns, self.bins = columns, bins
        self.channels = ChannelStats(columns, bins)
        self.hessian = HessianObserver(columns) if "hessian" in needs else None
        self.sample = InputSample(columns, bins) if "sample" in needs else None

    @staticmethod
    def nbytes(columns: int, bins: int, needs: frozenset[str]) -> int:
        """Bytes in memory at the end of a calibration run; the arguments are those of the class."""
        rows = _capacity(columns) if "sample" in needs else 0
        hessian = columns**2 if "hessian" in needs else 0
        return 4 * (hessian + rows * columns) + 24 * bins * columns

    def observe(self, rows: Tensor, origin: SampleOrigin) -> None:
        """Add rows (R, K) of any float dtype; they are read as float32."""
        for observer in self._observers().values():
            observer.observe(rows.float(), origin)

    def merge(self, other: InputStats) -> None:
        """Add the rows that another one observed."""
        others = other._observers()
        for name, observer in self._observers().items():
            observer.merge(others[name])  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """The state, by ``observer.tensor``."""
        return {
            f"{name}.{key}": tensor
            for name, observer in self._observers().items()
            for key, tensor in observer.tensors().items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Inverse of :meth:`tensors`."""
        bins, columns = tensors["channels.low"].shape
        stats = cls(columns, bins, frozenset(key.split(".")[0] for key in tensors))
        for name, observer in stats._observers().items():
            prefix = f"{name}."
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            observer.load(own)
        return stats

    def _observers(self) -> dict[str, ChannelStats | HessianObserver | InputSample]:
        observers = {"channels": self.channels, "hessian": self.hessian, "sample": self.sample}
        return {name: observer for name, observer in observers.items() if observer is not None}


def _capacity(columns: int) -> int:
    """Rows of a sample: about 16 MB, at most 4096 rows."""
    return max(256, min(4096, 2**22 // columns))


def _evenly_spaced(total: int, count: int, call: int) -> slice:
    """At most ``count`` of ``total`` rows, evenly spaced, the phase moving with the call."""
    step = max(1, -(-total // count))
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
