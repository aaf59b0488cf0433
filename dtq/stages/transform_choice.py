# SPDX-License-Identifier: Apache-2.0
"""Choose the transform of an input, and report what it does."""

from __future__ import annotations

from torch import Tensor

from dtq.calibrate.observers import InputStats
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io.schema import MethodSpec
from dtq.models import InputGroup
from dtq.plan.layers import LayerPlan, Plan
from dtq.stages.layer_result import InputReport
from dtq.transforms import TRANSFORMS, OnlineTransform, TransformChoice


def choose_transform(
    layers: list[LayerPlan], weights: list[Tensor], stats: InputStats | None
) -> TransformChoice:
    """Choose one transform for linears that share an input.

    Args:
        layers: their plans; the first one's transform method and formats hold for all.
        weights: float (N, K) of each.
        stats: of the input. None if no row reached it: a method that needs data is ``none`` then.
    """
    first = layers[0]
    method, knobs = TRANSFORMS[first.transform.name], dict(first.transform.knobs)
    if method.needs and stats is None:
        method, knobs = TRANSFORMS["none"], {}
    fmt, activations = FORMATS[first.weight_format], ACTIVATION_FORMATS[first.activation_format]
    return method.call(weights, stats, fmt=fmt, activations=activations, **knobs)


def input_report(
    group: InputGroup, stats: InputStats | None, choice: TransformChoice, chosen: OnlineTransform
) -> InputReport:
    """Imbalance of an input before and after its transform.

    Args:
        group: the input group.
        stats: of the input; without sampled rows the lists stay empty.
        choice: what the transform method returned, with the errors of its candidates.
        chosen: the transform that was kept, of ``choice`` or of a runner-up.
    """
    report = InputReport(group.name, candidates=choice.errors)
    if stats is None or stats.sample is None or not len(stats.sample.rows):
        return report
    rows, bins = stats.sample.rows, stats.sample.stratum // 2
    after = chosen.x(rows.to(chosen.scale.device)).cpu()
    for b in range(stats.bins):
        if (bins == b).any():
            report.bins.append(b + 1)
            report.imbalance.append(_imbalance(rows[bins == b]))
            report.imbalance_after.append(_imbalance(after[bins == b]))
    return report


def _imbalance(rows: Tensor) -> float:
    """Largest channel amax over the mean channel amax (ViDiT-Q's measure of imbalance)."""
    amax = rows.abs().amax(0)
    return float(amax.max() / amax.mean().clamp(min=1e-30))


def groups_sharing_transform(group: InputGroup, plan: Plan) -> list[list[LayerPlan]]:
    """The quantized linears of an input group; those in one list can share a transform."""
    sharing: dict[tuple[MethodSpec, str, int], list[LayerPlan]] = {}
    for linear in group.linears:
        layer = plan[linear.name]
        if not layer.unquantized:
            key = layer.transform, layer.activation_format, layer.spec.hadamard_block_size
            sharing.setdefault(key, []).append(layer)
    return list(sharing.values())
