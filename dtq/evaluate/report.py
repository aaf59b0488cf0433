# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: verdict, pictures side by side, errors per step and per layer."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from dtq.evaluate import pictures
from dtq.evaluate.run import Evaluation, Row

CLOSE = 1e-2
"""Teacher-forced error below which the page says "close". A rule of thumb, not the gate."""

_STYLE = """
:root { color-scheme: light; --ink: #1c2024; --soft: #667079; --line: #e3e6e8; --good: #14713d; --bad: #a5281b; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 1080px; margin: 32px auto; padding: 0 20px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 8px; }
p.sub, figcaption, td.soft { color: var(--soft); } figcaption { font-size: 13px; }
.verdict { border-left: 5px solid var(--good); background: #f2f8f4; padding: 12px 16px; margin: 18px 0; font-size: 16px; }
.verdict.bad { border-color: var(--bad); background: #fbf2f1; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.scroll { overflow-x: auto; } figure { margin: 12px 0; } figure img { max-width: 100%; }
svg { max-width: 100%; height: auto; } .row { display: flex; flex-wrap: wrap; gap: 12px; }
.row > figure { flex: 1 1 420px; min-width: 0; } code { background: #f3f4f5; padding: 1px 5px; border-radius: 4px; }
img.sheet { image-rendering: pixelated; }
"""


def verdict(result: Evaluation) -> tuple[bool, str]:
    """Whether the candidate is close to its float model, and one sentence that says how close."""
    row = result.rows[0]
    close = row.error <= CLOSE
    words = [f"per-step error {row.error:.2g} (same inputs, relative squared, mean over steps)"]
    if row.bits is not None:
        words.append(
            f"{row.bits:.2f} bits per attention and feed-forward weight, all metadata counted"
        )
    if row.psnr is not None:
        words.append(f"same-seed pictures at {row.psnr:.1f} dB PSNR (median)")
    if row.fid_float is not None:
        words.append(f"domain FID {row.fid_float:.2f} to the float model's pictures")
    head = "Close to the float model" if close else "Not close to the float model"
    return close, f"{head}: {'; '.join(words)}."


def render(result: Evaluation) -> str:
    """The page as HTML text."""
    close, sentence = verdict(result)
    report = result.quantization
    parts = [
        f"<h1>{_t(result.candidate)} <small>against {_t(result.reference)}</small></h1>",
        f"<p class=sub>{_conditions(result.conditions)}</p>",
        f"<div class='verdict{'' if close else ' bad'}'>{_t(sentence)}</div>",
        "<h2>Pictures, same seeds</h2>",
        _sheet(result),
        "<h2>Figures</h2>",
        _table(result),
        "<div class=row>",
        _steps_plot(result.rows),
        _divergence_plot(result.rows[0]),
        "</div>",
    ]
    if report:
        parts += [
            "<h2>Layers</h2>",
            "<div class=row>",
            _layer_plot(report),
            _range_plot(report),
            "</div>",
            _layer_table(report),
        ]
    title = f"dtq: {result.candidate} against {result.reference}"
    body = "\n".join(parts)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_t(title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style><body>{body}</body></html>"
    )


def _sheet(result: Evaluation) -> str:
    rows = [p[:16] for p in result.pictures.values() if p.ndim == 4]
    if not rows:
        return "<p class=sub>No still pictures to show.</p>"
    rows = [r for pair in zip(*(row.split(8) for row in rows), strict=True) for r in pair]
    size = rows[0].shape[-1]
    data = base64.b64encode(pictures.png(pictures.sheet(rows, scale=max(1, 128 // size)))).decode()
    names = " above, ".join(_t(n) for n in result.pictures)
    return (
        f"<figure><img class=sheet alt='pictures side by side' src='data:image/png;base64,{data}'>"
        f"<figcaption>Pairs of rows: {names} below.</figcaption></figure>"
    )


def _table(result: Evaluation) -> str:
    head = (
        "model",
        "per-step error",
        "worst step",
        "bits/weight",
        "PSNR median",
        "PSNR worst",
        "SSIM",
        "FID to float",
        "FID to real",
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{cell}</td>"
            for cell in (
                _t(row.name),
                _n(row.error, ".2e"),
                _n(max(row.error_steps, default=None), ".2e"),
                _n(row.bits, ".2f"),
                _n(row.psnr, ".1f"),
                _n(row.psnr_worst, ".1f"),
                _n(row.ssim, ".4f"),
                _n(row.fid_float, ".2f"),
                _n(row.fid_real, ".2f"),
            )
        )
        + "</tr>"
        for row in result.rows
    )
    note = ""
    if result.fid_real_float is not None:
        note = f"<p class=sub>The float model's own FID to the training set: {result.fid_real_float:.2f}.</p>"
    cells = "".join(f"<th>{h}</th>" for h in head)
    return f"<div class=scroll><table><tr>{cells}</tr>{body}</table></div>{note}"


def _steps_plot(rows: list[Row]) -> str:
    figure, axes = _axes()
    for row in rows:
        axes.plot(
            range(1, len(row.error_steps) + 1), row.error_steps, marker="o", ms=3, label=row.name
        )
    axes.set(xlabel="step (noisiest first)", ylabel="relative squared error", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    return _figure(figure, "Teacher-forced: every model gets the float run's inputs at each step.")


def _divergence_plot(row: Row) -> str:
    figure, axes = _axes()
    steps = range(2, len(row.divergence) + 1)  # both runs enter the first step with the same noise
    axes.plot(steps, row.divergence[1:], marker="o", ms=3)
    axes.set(xlabel="step", ylabel="relative squared distance of latents", yscale="log")
    return _figure(figure, "Free-running: how far the latents drift apart from the same seed.")


def _layer_plot(report: dict[str, Any]) -> str:
    layers = [x for x in report["layers"] if x["error"] is not None]
    figure, axes = _axes()
    for role in sorted({x["role"] for x in layers}):
        points = [(i, x["error"]) for i, x in enumerate(layers) if x["role"] == role]
        axes.scatter(*zip(*points, strict=True), s=12, label=role)
    axes.set(xlabel="layer, in call order", ylabel="relative squared output error", yscale="log")
    axes.legend(frameon=False, fontsize=7, ncol=3)
    return _figure(figure, "Output error of each quantized layer on sampled calibration rows.")


def _range_plot(report: dict[str, Any]) -> str:
    plain = {x["name"] for x in report["layers"] if x["role"] == "adaln"}  # no transform there
    sites = [s for s in report["sites"] if s["peaks"] and s["name"] not in plain]
    if not sites:
        return ""
    figure, axes = _axes()
    for key, label, color in (
        ("peaks", "before", "tab:red"),
        ("peaks_after", "after", "tab:green"),
    ):
        lines = [s[key] for s in sites]
        bins = range(1, len(lines[0]) + 1)
        for line in lines:
            axes.plot(bins, line, color=color, alpha=0.15, lw=0.8)
        middle = [sorted(column)[len(column) // 2] for column in zip(*lines, strict=True)]
        axes.plot(bins, middle, color=color, lw=2.2, label=f"{label} (median)")
    axes.set(
        xlabel="timestep bin (last is noisiest)",
        ylabel="largest channel peak / mean peak",
        yscale="log",
    )
    axes.legend(frameon=False, fontsize=8)
    return _figure(
        figure,
        "Activation range over timesteps, before and after the transforms; one line per input.",
    )


def _layer_table(report: dict[str, Any]) -> str:
    head = "".join(
        f"<th>{h}</th>" for h in ("layer", "role", "weights", "bits", "error", "transform")
    )
    rows = "".join(
        f"<tr><td>{_t(x['name'])}</td><td>{_t(x['role'])}</td><td>{_t(x['weights'])}{' (promoted)' if x['promoted'] else ''}</td>"
        f"<td>{x['bits']:.2f}</td><td>{_n(x['error'], '.1e')}</td><td>{_t(x['transform'])}</td></tr>"
        for x in report["layers"]
    )
    return f"<details><summary>{len(report['layers'])} layers</summary><div class=scroll><table><tr>{head}</tr>{rows}</table></div></details>"


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.4, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, axis="y", color="#e3e6e8", lw=0.6)
    return figure, axes


def _figure(figure: Any, caption: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return f"<figure>{text[text.index('<svg') :]}<figcaption>{caption}</figcaption></figure>"


def _conditions(conditions: dict[str, Any]) -> str:
    return _t(" · ".join(f"{key} {value}" for key, value in conditions.items()))


def _n(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _t(text: object) -> str:
    return html.escape(str(text))
