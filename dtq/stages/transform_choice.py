# SPDX-License-Identifier: Apache-2.0
"""Choose the transform of an input, and report what it does."""

from __future__ import annotations

from torch import Tensor

from dtq.calibrate.observers import InputStats
from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io.schema import MethodSpec
from dtq.models import InputGroup
from dtq.plan.layers import LayerPlan, Plan
from dtq.stages.layer_result import InputReport
from dtq.transforms import TRANSFORMS, OnlineTransform, TransformChoice


def choose_transform(
    members: list[LayerPlan], weights: list[Tensor], stats: InputStats | None
) -> TransformChoice:
    layer = members[0]
    method = TRANSFORMS[layer.transform.name]
    if method.needs and stats is None:
        raise InputError(f"{layer.name}: transform {layer.transform.name} needs calibration data")
    return method.call(
        weights,
        stats,
        fmt=FORMATS[layer.weight_format],
        activations=ACTIVATION_FORMATS[layer.activation_format],
        **dict(layer.transform.knobs),
    )


def input_report(
    group: InputGroup, stats: InputStats | None, choice: TransformChoice, transform: OnlineTransform
) -> InputReport:
    report = InputReport(group.name, candidates=choice.errors)
    if stats is None or stats.sample is None or not len(stats.sample.rows):
        return report
    rows, bins = stats.sample.rows, stats.sample.stratum // 2
    after = transform.x(rows.to(transform.scale.device)).cpu()
    for b in range(stats.bins):
        if (bins == b).any():
            report.imbalance.append(_imbalance(rows[bins == b]))
            report.imbalance_after.append(_imbalance(after[bins == b]))
    return report


def _imbalance(rows: Tensor) -> float:
    """Largest channel peak over the mean channel peak (ViDiT-Q's measure of imbalance)."""
    peaks = rows.abs().amax(0)
    return float(peaks.max() / peaks.mean().clamp(min=1e-30))


def groups_sharing_transform(group: InputGroup, plan: Plan) -> list[list[LayerPlan]]:
    """The quantized linears of a site, those together that can share one transform."""
    groups: dict[tuple[MethodSpec, str, int], list[LayerPlan]] = {}
    for linear in group.linears:
        layer = plan[linear.name]
        if not layer.unquantized:
            groups.setdefault(
                (layer.transform, layer.activation_format, layer.hadamard_block_size), []
            ).append(layer)
    return list(groups.values())
