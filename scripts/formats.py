# SPDX-License-Identifier: Apache-2.0
"""Print the table of docs/formats.md: ``python scripts/formats.py`` (about a minute)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtq.formats import FORMATS, Format, bits_per_weight
from dtq.solvers import SOLVERS

ROWS = 1152
SHORT = {
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3",
}


def draw(kind: str, rows: int = 256, columns: int = 1152, seed: int = 3) -> Tensor:
    """Rows of unit variance: evenly spaced quantiles of a distribution, shuffled.

    Quantiles, not independent draws: the error of a format with one scale per row depends on a few
    large values, and with quantiles the tail is the same for every seed.
    """
    n = rows * columns
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x = math.sqrt(2) * torch.erfinv(2 * p - 1)
    if kind == "laplace":
        x = -(p - 0.5).sign() * torch.log1p(-2 * (p - 0.5).abs()) / math.sqrt(2)
    elif kind == "t5":
        x = _t5(p) / math.sqrt(5 / 3)
    elif kind == "contaminated":  # a Gaussian with 0.3 % of values six times as large
        x = torch.where(torch.arange(n) % 333 == 0, 6 * x, x)
    perm = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return x[perm].reshape(rows, columns).float()


def _t5(p: Tensor) -> Tensor:
    """Quantiles of Student's t with 5 degrees of freedom."""
    t = torch.linspace(-8, 8, 200001, dtype=torch.float64).sinh()
    a = torch.atan(t / math.sqrt(5))
    cdf = 0.5 + (a + a.sin() * a.cos() * (1 + a.cos().square() * 2 / 3)) / math.pi
    i = torch.searchsorted(cdf, p).clamp(1, len(t) - 1)
    return t[i - 1] + (p - cdf[i - 1]) / (cdf[i] - cdf[i - 1]) * (t[i] - t[i - 1])


def nmse(w_q: Tensor, w: Tensor) -> float:
    """Squared error divided by squared norm."""
    return float((w_q - w).square().sum() / w.square().sum())


def columns_for(fmt: Format) -> int:
    """Columns of the matrices that a format is shown on: whole superblocks of K-quants."""
    return 1280 if fmt.group == 256 else 1152


def about(fmt: Format) -> str:
    """The columns that follow from the tensor specs: name, tensors, bits."""
    shape = (ROWS, columns_for(fmt))
    tensors = [
        f"{name} {SHORT[spec.dtype]} {'x'.join(map(str, spec.shape))}"
        for name, spec in fmt.tensor_specs(shape).items()
    ]
    return f"| `{fmt.name}` | {'; '.join(tensors)} | {bits_per_weight(fmt, shape):.2f} |"


def errors(fmt: Format) -> str:
    """The measured columns: rtn and clip search, on normal and on t(5) values. Data-dependent formats
    have no clip search."""
    solvers = ("rtn",) if fmt.data_dependent else ("rtn", "search")
    cells = []
    columns = columns_for(fmt)
    for w in (draw("normal", columns=columns), draw("t5", columns=columns)):
        values = [f"{nmse(SOLVERS[s].call(w, fmt)[0], w):.3g}".removeprefix("0") for s in solvers]
        cells += values if len(values) == 2 else ["", *values]
    return " " + " | ".join(cells) + " |"


if __name__ == "__main__":
    for fmt in FORMATS.values():
        print(about(fmt) + errors(fmt), flush=True)
