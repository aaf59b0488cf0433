# SPDX-License-Identifier: Apache-2.0
"""Choose the transform of an input, and report what it does."""

from __future__ import annotations

from torch import Tensor

from dtq.calibrate.observers import SiteStats
from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.formats.activations import ACTS
from dtq.io.schema import Call
from dtq.models import Site
from dtq.plan.layers import LayerPlan, Plan
from dtq.stages.layer_result import SiteReport
from dtq.transforms import TRANSFORMS, Choice, Online


def choose(members: list[LayerPlan], weights: list[Tensor], stats: SiteStats | None) -> Choice:
    layer = members[0]
    method = TRANSFORMS[layer.transform.name]
    if method.needs and stats is None:
        raise InputError(f"{layer.name}: transform {layer.transform.name} needs calibration data")
    return method.call(
        weights,
        stats,
        fmt=FORMATS[layer.weights],
        acts=ACTS[layer.acts],
        **dict(layer.transform.knobs),
    )


def describe(site: Site, stats: SiteStats | None, choice: Choice, transform: Online) -> SiteReport:
    report = SiteReport(site.name, candidates=choice.errors)
    if stats is None or stats.reservoir is None or not len(stats.reservoir.rows):
        return report
    rows, bins = stats.reservoir.rows, stats.reservoir.stratum // 2
    after = transform.x(rows.to(transform.scale.device)).cpu()
    for b in range(stats.bins):
        if (bins == b).any():
            report.peaks.append(_imbalance(rows[bins == b]))
            report.peaks_after.append(_imbalance(after[bins == b]))
    return report


def _imbalance(rows: Tensor) -> float:
    """Largest channel peak over the mean channel peak (ViDiT-Q's measure of imbalance)."""
    peaks = rows.abs().amax(0)
    return float(peaks.max() / peaks.mean().clamp(min=1e-30))


def alike(site: Site, plan: Plan) -> list[list[LayerPlan]]:
    """The quantized linears of a site, those together that can share one transform."""
    groups: dict[tuple[Call, str, int], list[LayerPlan]] = {}
    for linear in site.linears:
        layer = plan[linear.name]
        if not layer.kept:
            groups.setdefault((layer.transform, layer.acts, layer.block), []).append(layer)
    return list(groups.values())
