# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: verdict, pictures side by side, errors per step and per layer."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dtq.evaluate.evaluate import Evaluation
from dtq.evaluate.gate.bootstrap import paired
from dtq.evaluate.gate.metrics import METRICS, TINY, Metric
from dtq.evaluate.metrics import images
from dtq.evaluate.metrics.distributions import MetricValue
from dtq.evaluate.report import plots
from dtq.evaluate.run_file import Run, Value

CLOSE = 1e-2
"""Teacher-forced error below which the page says "close". A rule of thumb, not the gate."""

SHOWN = 24
"""Samples on the contact sheet, the worst ones."""

WIDEST = 384
"""Pixels of a picture's longer side on the page."""

FIGURES = ("figure", "against", "value", "change from float", "95 %", "N", "reference N")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c666f; --line: #dfe3e6; --page: #fff;
  --card: #f6f7f8; --good: #14713d; --bad: #a5281b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5ae; --line: #363d43;
  --page: #14181b; --card: #1e2327; --good: #4cc38a; --bad: #f2705f; } }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1180px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h1 small { color: var(--soft); font-weight: 400; }
h2 { font-size: 17px; margin: 36px 0 8px; }
p.sub, figcaption { color: var(--soft); font-size: 13px; }
.verdict { border-left: 5px solid var(--good); background: var(--card); padding: 12px 16px;
  margin: 18px 0; font-size: 16px; }
.verdict.bad { border-color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; }
td.words, th.words { white-space: normal; text-align: left; overflow-wrap: break-word;
  min-width: 230px; }
figure { margin: 12px 0; min-width: 0; }
svg { max-width: 100%; height: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 12px 28px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr));
  gap: 18px 22px; }
.pairs figure { margin: 0; }
.pairs div { display: flex; gap: 3px; }
.pairs img { flex: 1 1 0; min-width: 0; width: 0; }
.pairs img.small { image-rendering: pixelated; }
.pairs figcaption { overflow-wrap: anywhere; }
code, pre { background: var(--card); border-radius: 4px; }
code { padding: 1px 5px; }
pre { padding: 10px 12px; overflow-x: auto; }
summary { cursor: pointer; }
@media (max-width: 560px) { body { padding: 16px 14px 48px; } .verdict { font-size: 15px; } }
"""


def verdict(result: Evaluation) -> tuple[bool, str]:
    """Whether the candidate is close to its float model, and one sentence that says how close."""
    row = result.rows[0]
    run = result.run
    if run is not None and (run.missing or run.failures):
        lost = [*run.missing, *(f"sample {name}" for name in run.failures)]
        return False, f"Not a valid run: {', '.join(lost)} could not be measured."
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
        f"<div class='verdict{'' if close else ' bad'}'>{_t(sentence)}</div>",
        _lost(result.run),
        "<h2>Same seeds, most harmed first</h2>",
        _pairs(result),
        "<h2>Models</h2>",
        _table(result),
        *(["<h2>Figures of each sample</h2>", _values(result.run)] if result.run else []),
        *(["<h2>Figures of whole sets</h2>", _figures(result)] if result.metrics else []),
        "<h2>Steps</h2>",
        "<div class=plots>",
        _figure(
            plots.steps([(row.name, row.error_steps) for row in result.rows]),
            "Teacher-forced: every model gets the float run's inputs at each step.",
        ),
        _divergence(result),
        "</div>",
        *(_layers(report) if report else []),
        "<h2>Conditions</h2>",
        _conditions(result),
    ]
    title = f"dtq: {result.candidate} against {result.reference}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_t(title)}</title>"
        f"<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style><body>{chr(10).join(parts)}</body></html>"
    )


def figure_cells(each: MetricValue) -> tuple[str, ...]:
    """A line of the table under ``FIGURES``."""
    between = "–"
    if each.low is not None and each.high is not None:
        between = f"{each.low:.4g} .. {each.high:.4g}"
    return (
        each.metric,
        each.against or "–",
        f"{each.value:.4g}",
        "–" if each.change is None else f"{each.change:+.4g}",
        between,
        str(each.samples),
        "moments" if each.against and each.reference_samples is None
        else str(each.reference_samples or "–"),
    )  # fmt: skip


def figure_conditions(result: Evaluation) -> str:
    """What figures of sets depend on, in one line."""
    job = result.conditions
    seen = {
        f"{f.metric}: {f.extractor}, resizer {f.resizer}, {f.samples} samples"
        for f in result.metrics
    }
    return (
        f"{job.get('steps')} steps of {job.get('sampler')}, guidance {job.get('guidance')}; "
        f"{'; '.join(sorted(seen))}. Figures of other N, steps, sampler, guidance, resizer or "
        f"reference cannot be compared with these."
    )


def _lost(run: Run | None) -> str:
    if run is None or not (run.missing or run.failures):
        return ""
    lines = [f"{name} was asked for and is missing: {why}" for name, why in run.missing.items()]
    lines += [f"sample {name}: {why}" for name, why in run.failures.items()]
    return f"<ul>{''.join(f'<li>{_t(line)}</li>' for line in lines)}</ul>"


def _pairs(result: Evaluation) -> str:
    """Float, candidate and difference of each sample; videos move."""
    want, got = result.images.values()
    if want.ndim == 3:
        return "<p class=sub>Sounds are not shown.</p>"
    run = result.run
    errors = [0.0] * len(want)
    names = [str(i) for i in range(len(want))]
    if run is not None:
        errors = [_mean(run.values["error"][sample.id]) for sample in run.samples]
        names = [sample.prompt for sample in run.samples]
    order = sorted(range(len(want)), key=lambda i: -errors[i])[:SHOWN]
    gaps = [(got[i].nan_to_num() - want[i].nan_to_num()).abs() for i in order]
    # the largest few pixels may saturate: one flipped edge must not hide all other differences
    sample = torch.cat([gap.flatten()[:: max(1, gap.numel() // 20_000)] for gap in gaps])
    most = float(torch.quantile(sample, 0.995))
    gain = 2.0 ** max(0, math.floor(math.log2(1 / most))) if most > 0 else 1.0
    small = " class=small" if max(want.shape[-2:]) <= 128 else ""
    figures = []
    for i, gap in zip(order, gaps, strict=True):
        images = "".join(
            f"<img{small} alt='{alt}' src='data:image/png;base64,{_encoded(shown)}'>"
            for alt, shown in (
                ("float", want[i]),
                ("candidate", got[i]),
                ("difference", gap * gain),
            )
        )
        words = f"{_t(names[i])} · error {errors[i]:.1e}"
        if run is not None and "psnr" in run.values:
            words += f", {_mean(run.values['psnr'][run.samples[i].id]):.1f} dB"
        figures.append(f"<figure><div>{images}</div><figcaption>{words}</figcaption></figure>")
    return (
        f"<p class=sub>Float, candidate, and their difference times {gain:g}; {len(order)} of "
        f"{len(want)} samples.</p><div class=pairs>{''.join(figures)}</div>"
    )


def _table(result: Evaluation) -> str:
    head = (
        "model", "per-step error", "worst step", "bits/weight", "PSNR median", "PSNR worst",
        "SSIM", "FID to float", "FID to real",
    )  # fmt: skip
    rows = [
        (
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
        for row in result.rows
    ]
    note = ""
    if len(result.rows) > 1:
        note = (
            "<p class=sub>Other libraries quantize the same linears of the same float model and see "
            "the same inputs; everything else of theirs stays in float.</p>"
        )
    if result.fid_real_float is not None:
        note += f"<p class=sub>The float model's own FID to the training set: {result.fid_real_float:.2f}.</p>"
    return _grid(head, rows) + note


def _values(run: Run) -> str:
    """Mean over prompts of every metric, its interval, and what a float re-run moves it by."""
    rows = []
    for name, table in run.values.items():
        metric = METRICS.get(name)
        if metric is None:
            continue
        by_prompt: dict[str, list[float]] = {}
        noise = []
        for sample in run.samples:
            value = _mean(table[sample.id])
            by_prompt.setdefault(sample.prompt, []).append(value)
            if sample.id in run.rerun.get(name, {}):
                noise.append(abs(metric.worse(_mean(run.rerun[name][sample.id]), value)))
        units = [sum(v) / len(v) for v in by_prompt.values()]
        moved = metric.shown(sum(noise) / len(noise)) if noise else "–"
        mean, between = _interval(units, metric)
        rows.append((f"{name}", mean, between, moved, _t(metric.about)))
    samples = f"{len(run.samples)} samples of {len({s.prompt for s in run.samples})} prompts"
    head = ("figure", "mean", "95 %", "float re-run moves it by", "what it is")
    return (
        _grid(head, rows, last_words=True)
        + f"<p class=sub>{samples}; studentized bootstrap over prompts. Errors have geometric means."
        "</p>"
    )


def _interval(units: Sequence[float], metric: Metric) -> tuple[str, str]:
    x = [math.log(max(v, TINY)) if metric.ratio else v for v in units]
    if not all(map(math.isfinite, x)):
        return "not finite", "–"
    back = math.exp if metric.ratio else float
    mean = sum(x) / len(x)
    if len(x) < 8:
        return f"{back(mean):.4g}", "too few"
    found = paired(x, floor=1e-9, resamples=1999)
    return f"{back(mean):.4g}", f"{back(found.lower(0.025)):.4g} .. {back(found.upper(0.025)):.4g}"


def _figures(result: Evaluation) -> str:
    rows = [tuple(map(_t, figure_cells(each))) for each in result.metrics]
    return (
        _grid(FIGURES, rows)
        + "<p class=sub>95 % is of the change where there is one, by a bootstrap over what was "
        f"asked for. {_t(figure_conditions(result))}</p>"
    )


def _divergence(result: Evaluation) -> str:
    values = result.rows[0].divergence
    if len(values) < 2:
        return ""
    return _figure(
        plots.divergence(values),
        "Free-running: how far the latents drift apart from the same seed.",
    )


def _layers(report: dict[str, Any]) -> list[str]:
    measured = [x for x in report["layers"] if x["error"] is not None]
    plain = {x["name"] for x in report["layers"] if x["role"] == "adaln"}  # no transform there
    sites = [s for s in report["inputs"] if s["imbalance"] and s["name"] not in plain]
    found = ["<h2>Layers</h2>", "<div class=plots>"]
    if measured:
        words = "Output error of each quantized layer on sampled calibration rows."
        found.append(_figure(plots.layers(measured), words))
    if sites:
        words = "Activation range over timesteps, before and after the transforms."
        found.append(_figure(plots.ranges(sites), f"{words} One thin line per input."))
    head = ("layer", "role", "weights", "bits", "error", "transform")
    rows = [
        (
            _t(x["name"]),
            _t(x["role"]),
            _t(x["weight_format"] + (" (promoted)" if x["promoted"] else "")),
            f"{x['bits']:.2f}",
            _n(x["error"], ".1e"),
            _t(x["transform"]),
        )
        for x in report["layers"]
    ]
    found += ["</div>", f"<details><summary>{len(rows)} layers</summary>{_grid(head, rows)}"]
    return [*found, "</details>"]


def _conditions(result: Evaluation) -> str:
    known = dict(result.conditions)
    if result.run is not None:
        known |= {f"{k} fingerprint": v for k, v in result.run.identity.items() if k != "recipe"}
        known["recipe"] = result.run.identity.get("recipe")
    rows = [(_t(key), _t(value)) for key, value in known.items()]
    command = f"<pre>{_t(result.command)}</pre>" if result.command else ""
    return command + _grid(("", ""), rows, last_words=True)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]], last_words: bool = False) -> str:
    """A table of cells that are HTML already; ``last_words`` lets the last column wrap."""
    cells = [f"<th>{h}</th>" for h in head] if any(head) else []
    if last_words and cells:
        cells[-1] = f"<th class=words>{head[-1]}</th>"
    top = "".join(cells)
    body = ""
    for row in rows:
        cells = [f"<td>{cell}</td>" for cell in row]
        if last_words:
            cells[-1] = f"<td class=words>{row[-1]}</td>"
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<div class=scroll><table><tr>{top}</tr>{body}</table></div>"


def _figure(drawn: str, caption: str) -> str:
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _encoded(shown: Tensor) -> str:
    return base64.b64encode(images.file(shown, WIDEST)).decode()


def _mean(value: Value) -> float:
    if not isinstance(value, list):
        return float(value)
    return sum(value) / len(value)


def _n(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _t(text: object) -> str:
    return html.escape(str(text))
