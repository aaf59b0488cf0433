# SPDX-License-Identifier: Apache-2.0
"""Tables, sizes and durations, as every command prints them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dtq.evaluate.run_file import Contribution
    from dtq.plan.layers import Plan

INVALID = 3
"""Exit code of ``dtq eval`` and ``dtq gate`` when metrics are missing or not comparable."""

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a header, a line and the rows, in columns."""
    lines = [tuple(map(str, row)) for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, tuple("-" * width for width in widths))
    for line in lines:
        click.echo("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())


COMPONENT_COLUMNS = ("only quantized", "error of a step", "share", "divergence", "PSNR")
"""Of the table of components of ``dtq eval`` and ``dtq gate``."""


def component_cells(row: Contribution) -> tuple[str, ...]:
    """Cells of a row of that table."""
    return (
        row.component,
        or_dash(row.error, ".2e"),
        or_dash(row.share, ".0%"),
        f"{row.divergence:.2e}",
        or_dash(row.psnr, ".1f"),
    )


def number_of_tables(count: int) -> str:
    """How many tables of embeddings, in words."""
    return f"{count} table{'' if count == 1 else 's'} of embeddings"


def fold(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows that differ in an index in their first cell alone, as one row.

    ``blocks.0.attn.to_q`` and so on become ``blocks.0 to 27.attn.to_q``, in the place of the first.
    """
    folded = list(rows)
    depth = max((len(_INDEX.findall(name)) for name, *_ in folded), default=0)
    for level in reversed(range(depth)):  # the innermost index first: experts, then blocks
        groups: dict[tuple[str, ...], list[int]] = {}
        for name, *cells in folded:
            indices = list(_INDEX.finditer(name))
            if level < len(indices):
                start, end = indices[level].span(1)
                key = (name[:start], name[end:], *cells)
                groups.setdefault(key, []).append(int(name[start:end]))
            else:
                groups[name, "", *cells] = []
        folded = [
            (f"{before}{_ranges(numbers)}{after}", *cells)
            for (before, after, *cells), numbers in groups.items()
        ]
    return folded


def _ranges(numbers: list[int]) -> str:
    """Whole numbers as text: ``0 to 3, 5``."""
    if not numbers:
        return ""
    ends = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    runs = [numbers[a:b] for a, b in pairwise([0, *ends, len(numbers)])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def or_dash(value: float | None, form: str) -> str:
    """A number in a format, or a dash for None."""
    return "-" if value is None else format(value, form)


def size(count: float) -> str:
    """Bytes, with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_unknown(plan: Plan) -> None:
    """Print how many linears of a plan have no known role."""
    names = [x.name for x in plan.layers if x.role == "other"]
    if names:
        shown = ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
        click.echo(f"{len(names)} linears without a known role: {shown}")
