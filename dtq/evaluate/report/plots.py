# SPDX-License-Identifier: Apache-2.0
"""Plots of the report as SVG that takes its text and line colors from the page."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

INK, LINE = "#010203", "#010204"
"""Placeholders for the text and line color of the page while matplotlib draws."""

COLORS = ("#2f7ed8", "#d9822b", "#3a9d5d", "#b04fc4", "#c4493d", "#6b8299")


def steps(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Error of each step, one line per model; ``rows`` are names and errors."""
    figure, axes = _axes()
    for (name, values), color in zip(rows, cycle(COLORS)):
        axes.plot(range(1, len(values) + 1), values, marker="o", ms=3, label=name, color=color)
    axes.set(xlabel="step, noisiest first", ylabel="relative squared error", yscale="log")
    _legend(axes, 8)
    return _svg(figure)


def divergence(values: Sequence[float]) -> str:
    """Distance of the latents that enter each step; the first, 0 by construction, is left out."""
    figure, axes = _axes()
    axes.plot(range(2, len(values) + 1), values[1:], marker="o", ms=3, color=COLORS[0])
    axes.set(xlabel="step", ylabel="relative squared distance", yscale="log")
    return _svg(figure)


def feature_map(floats: Tensor, candidates: Tensor) -> str:
    """Both image sets on the two main axes of the float model's features; pairs are joined.

    Args:
        floats: features (N, D) of the float model's images.
        candidates: those of the candidate, image i with the prompt and seed of image i.
    """
    _, _, axes_of = torch.pca_lowrank(floats.double(), q=2)
    x, y = ((t.double() - floats.double().mean(0)) @ axes_of for t in (floats, candidates))
    figure, axes = _axes()
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        axes.plot(*zip(a, b, strict=True), color=LINE, lw=0.6, zorder=1)
    for points, label, color in ((x, "float", COLORS[0]), (y, "candidate", COLORS[1])):
        axes.scatter(*points.T.tolist(), s=7, label=label, color=color)
    axes.set(xlabel="first axis of the features", ylabel="second axis")
    _legend(axes, 8)
    return _svg(figure)


def feature_distances(distances: Tensor, apart: Tensor) -> str:
    """Distances of the pairs of images (N,), and those of the float model's nearest images (N,)."""
    figure, axes = _axes()
    for values, label, color in (
        (distances, "candidate to float, same seed", COLORS[1]),
        (apart, "float to its nearest other image", COLORS[0]),
    ):
        axes.plot(values.sort().values, torch.arange(1, len(values) + 1) / len(values),
                  label=label, color=color)  # fmt: skip
    axes.set(xlabel="distance of features", ylabel="share of images")
    axes.set_xlim(left=0)
    _legend(axes, 8)
    return _svg(figure)


def layers(rows: Sequence[dict[str, Any]]) -> str:
    """Output error of each layer in call order, colored by role; ``rows`` as in the report."""
    figure, axes = _axes()
    for role, color in zip(sorted({x["role"] for x in rows}), cycle(COLORS)):
        points = [(i, x["error"]) for i, x in enumerate(rows) if x["role"] == role]
        axes.scatter(*zip(*points, strict=True), s=12, label=role, color=color)
    axes.set(xlabel="layer, in call order", ylabel="relative squared output error", yscale="log")
    _legend(axes, 7, ncol=3)
    return _svg(figure)


def ranges(inputs: Sequence[dict[str, Any]]) -> str:
    """Imbalance of the channels of each input over timesteps, before and after its transform.

    Args:
        inputs: rows of ``dtq_report.json``; each is a thin line over the timestep bins that it was
            sampled in. One of two denoisers is called in some of them only.
    """
    figure, axes = _axes()
    for key, label, color in (
        ("imbalance", "before", COLORS[4]),
        ("imbalance_after", "after", COLORS[2]),
    ):
        columns: dict[int, list[float]] = {}
        for row in inputs:
            bins = row.get("bins") or range(1, len(row[key]) + 1)  # older reports do not say
            points = list(zip(bins, row[key], strict=False))
            axes.plot(*zip(*points, strict=True), color=color, alpha=0.18, lw=0.8)
            for column, value in points:
                columns.setdefault(column, []).append(value)
        middle = [sorted(columns[b])[len(columns[b]) // 2] for b in sorted(columns)]
        axes.plot(sorted(columns), middle, color=color, lw=2.2, label=f"{label} (median)")
    axes.set(xlabel="timestep bin, last is noisiest", ylabel="largest channel amax / mean amax")
    axes.set_yscale("log")
    _legend(axes, 8)
    return _svg(figure)


def bench(groups: dict[str, dict[str, tuple[float, float | None]]], ours: str) -> str:
    """Times relative to those of one backend, as grouped bars; a file of its own.

    Args:
        groups: title of a group to time and error by backend; an error of None is not shown.
        ours: name of the backend that the others are compared with.
    """
    figure, axes = _axes()
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(names)
    figure.set_size_inches(7.2, max(2.5, 0.9 + 0.16 * len(names) * len(groups)))
    # a color for each library, of which some have several rows
    colors = dict(zip(dict.fromkeys(map(_library, names)), cycle(COLORS)))
    for i, name in enumerate(names):
        here = [(g, *group[name]) for g, group in enumerate(groups.values()) if name in group]
        positions = [g + (i - (len(names) - 1) / 2) * width for g, _, _ in here]
        color = colors[_library(name)]
        bars = axes.barh(positions, [t for _, t, _ in here], width * 0.9, color=color)
        labels = [
            f"{t:.2f}  {name}" + ("" if e is None else f", error {e:.0e}") for _, t, e in here
        ]
        axes.bar_label(bars, labels, fontsize=6, color=INK, padding=2)
    axes.axvline(1, color=INK, lw=0.8, ls=":", zorder=0)
    axes.grid(False)
    titles = [textwrap.fill(title, 24) for title in groups]
    axes.set_yticks(range(len(groups)), titles, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel=f"time over that of {ours}: above 1 {ours} is faster")
    longest = max(time for group in groups.values() for time, _ in group.values())
    axes.set_xlim(0, 1.4 * longest)  # labels stand right of the bars
    styled = '<svg style="color:#222;--line:#ccc;background:#fff" '
    return _svg(figure).replace("<svg ", styled, 1)


def _library(name: str) -> str:
    """First word of the name of a row."""
    return name.replace(",", " ").split()[0]


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.4, 3.3), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    axes.tick_params(which="both", colors=INK, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, axis="y", color=LINE, lw=0.6)
    return figure, axes


def _legend(axes: Any, size: int, ncol: int = 1) -> None:
    axes.legend(frameon=False, fontsize=size, ncol=ncol, labelcolor=INK)


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    return text.replace(INK, "currentColor").replace(LINE, "var(--line)")
