# SPDX-License-Identifier: Apache-2.0
"""The page of ``dtq eval``: verdict, images side by side, errors per step and per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dtq.evaluate.evaluate import Evaluation
from dtq.evaluate.gate.bootstrap import paired
from dtq.evaluate.gate.decision import noise_of
from dtq.evaluate.gate.metrics import METRICS, TINY, Metric
from dtq.evaluate.metrics import images
from dtq.evaluate.metrics.distributions import MetricValue
from dtq.evaluate.metrics.precision_recall import distances
from dtq.evaluate.report import page, plots
from dtq.evaluate.run_file import Run, mean_of

CLOSE = 1e-2
"""Teacher-forced error below which the page says "close". A rule of thumb, not the gate."""

MAX_SAMPLES = 24
"""On the contact sheet: the worst ones."""

MAX_CHANGED = 8
"""Images of a set that are shown: those whose features changed most."""

MAX_PIXELS = 384
"""Longer side of an image on the page."""

METRIC_COLUMNS = ("metric", "against", "value", "change from float", "95 %", "N", "reference N")


def verdict(result: Evaluation) -> tuple[bool, str]:
    """Whether the candidate is close to its float model, and a sentence with its metrics."""
    row = result.rows[0]
    run = result.run
    if run.missing or run.failures:
        lost = [*run.missing, *(f"sample {name}" for name in run.failures)]
        return False, f"Not a valid run: {', '.join(lost)} could not be measured."
    close = row.error <= CLOSE
    words = [f"per-step error {row.error:.2g} (same inputs, relative squared, mean over steps)"]
    if row.bits is not None:
        bits = f"{row.bits:.2f} bits per attention and feed-forward weight"
        words.append(f"{bits}, all metadata counted")
    if row.psnr is not None:
        words.append(f"same-seed images at {row.psnr:.1f} dB PSNR (median)")
    if row.fid_float is not None:
        words.append(f"domain FID {row.fid_float:.2f} to the float model's images")
    head = "Close to the float model" if close else "Not close to the float model"
    return close, f"{head}: {'; '.join(words)}."


def render(result: Evaluation) -> str:
    """The page as HTML text."""
    close, sentence = verdict(result)
    divergence = result.rows[0].divergence
    report = result.quantization
    layers = report.get("layers", [])
    measured = [layer for layer in layers if layer["error"] is not None]
    inputs = over_timesteps(report)
    return page.render(
        "report.html",
        title=f"dtq: {result.run.candidate} against {result.run.reference}",
        result=result,
        close=close,
        sentence=sentence,
        sheet=_contact_sheet(result),
        sample_metrics=_sample_metrics(result.run),
        metric_columns=METRIC_COLUMNS,
        set_metrics=[metric_cells(value) for value in result.metrics],
        metric_conditions=metric_conditions(result),
        sets=_image_sets(result),
        steps_plot=plots.steps([(row.name, row.error_steps) for row in result.rows]),
        divergence_plot=plots.divergence(divergence) if len(divergence) > 1 else None,
        layers=layers,
        error_plot=plots.layers(measured) if measured else None,
        range_plot=plots.ranges(inputs) if inputs else None,
    )


def over_timesteps(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The inputs in a report that have a range in several timestep bins, without modulation.

    Those of text encoders, which run at no timestep, have one bin.
    """
    untransformed = {x["name"] for x in report.get("layers", []) if x["role"] == "adaln"}
    inputs = [x for x in report.get("inputs", []) if len(x["imbalance"]) > 1]
    return [x for x in inputs if x["name"] not in untransformed]


def metric_cells(value: MetricValue) -> tuple[str, ...]:
    """A row of the table under ``METRIC_COLUMNS``."""
    interval = "–"
    if value.low is not None and value.high is not None:
        interval = f"{value.low:.4g} .. {value.high:.4g}"
    return (
        value.metric,
        value.reference or "–",
        f"{value.value:.4g}",
        page.number(value.change, "+.4g"),
        interval,
        str(value.samples),
        "moments" if value.reference and value.reference_samples is None
        else str(value.reference_samples or "–"),
    )  # fmt: skip


def metric_conditions(result: Evaluation) -> str:
    """The conditions of distribution metrics in one line."""
    job = result.run.conditions
    sources = {
        f"{v.metric}: {v.extractor}, resizer {v.resizer}, {v.samples} samples"
        for v in result.metrics
    }
    return (
        f"{job.get('steps')} steps of {job.get('sampler')}, guidance {job.get('guidance')}; "
        f"{'; '.join(sorted(sources))}. Values with another N, steps, sampler, guidance, resizer "
        f"or reference cannot be compared with these."
    )


def _contact_sheet(result: Evaluation) -> dict[str, Any] | None:
    """Float, candidate and difference of each sample, worst first; videos are animated."""
    floats, candidates = result.images.values()
    if floats.ndim == 3:  # sounds
        return None
    run = result.run
    errors = [mean_of(run.values["error"][sample.id]) for sample in run.samples]
    captions = [f"{s.prompt} · error {e:.1e}" for s, e in zip(run.samples, errors, strict=True)]
    if "psnr" in run.values:
        psnr = (mean_of(run.values["psnr"][sample.id]) for sample in run.samples)
        captions = [f"{c}, {db:.1f} dB" for c, db in zip(captions, psnr, strict=True)]
    order = sorted(range(len(floats)), key=lambda i: -errors[i])[:MAX_SAMPLES]
    gaps = [(candidates[i].nan_to_num() - floats[i].nan_to_num()).abs() for i in order]
    # the largest few pixels may saturate: one flipped edge must not hide all other differences
    pixels = torch.cat([gap.flatten()[:: max(1, gap.numel() // 20_000)] for gap in gaps])
    most = float(torch.quantile(pixels, 0.995))
    gain = 2.0 ** max(0, math.floor(math.log2(1 / most))) if most > 0 else 1.0
    samples = []
    for i, gap in zip(order, gaps, strict=True):
        shown = {"float": floats[i], "candidate": candidates[i], "difference": gap * gain}
        sources = [(name, _source(image)) for name, image in shown.items()]
        samples.append({"images": sources, "caption": captions[i]})
    small = max(floats.shape[-2:]) <= 128
    return {"gain": f"{gain:g}", "total": len(floats), "small": small, "samples": samples}


def _image_sets(result: Evaluation) -> dict[str, Any] | None:
    """Plots of the features of each extractor, and the images whose features changed most."""
    info = result.run.image_sets
    if info is None:
        return None
    sets = result.image_sets
    extractor = next(iter(info.extractors))
    floats, own = (sets[side].features_of(extractor)["pool"] for side in ("float", "candidate"))
    moved = (floats - own).norm(dim=1)
    apart = distances(floats.double(), floats.double()).fill_diagonal_(math.inf).amin(1)
    samples = []
    for i in moved.argsort(descending=True)[:MAX_CHANGED].tolist():
        pair = [(side, _source(sets[side].bytes[i] / 255)) for side in ("float", "candidate")]
        samples.append({"images": pair, "caption": f"{info.prompts[i]} · moved {moved[i]:.3g}"})
    return {
        "extractor": extractor,
        "map": plots.feature_map(floats, own),
        "distances": plots.feature_distances(moved, apart),
        "total": len(floats),
        "small": max(sets["float"].bytes.shape[-2:]) <= 128,
        "samples": samples,
    }


def _sample_metrics(run: Run) -> list[tuple[str, ...]]:
    """For each metric the mean over prompts, its interval, and the change by a float re-run."""
    rows: list[tuple[str, ...]] = []
    for name, table in run.values.items():
        metric = METRICS[name]
        by_prompt: dict[str, list[float]] = {}
        for sample in run.samples:
            by_prompt.setdefault(sample.prompt, []).append(mean_of(table[sample.id]))
        change = metric.shown(noise_of(run, metric)) if name in run.rerun else "–"
        mean, interval = _interval([sum(v) / len(v) for v in by_prompt.values()], metric)
        rows.append((name, mean, interval, change, metric.about))
    return rows


def _interval(values: Sequence[float], metric: Metric) -> tuple[str, str]:
    x = [math.log(max(v, TINY)) if metric.ratio else v for v in values]
    if not all(map(math.isfinite, x)):
        return "not finite", "–"
    back = math.exp if metric.ratio else float
    mean = sum(x) / len(x)
    if len(x) < 8:
        return f"{back(mean):.4g}", "too few"
    bounds = paired(x, floor=1e-9, resamples=1999)
    low, high = back(bounds.lower(0.025)), back(bounds.upper(0.025))
    return f"{back(mean):.4g}", f"{low:.4g} .. {high:.4g}"


def _source(image: Tensor) -> str:
    return page.image_source(images.file(image, MAX_PIXELS))
