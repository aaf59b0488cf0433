# SPDX-License-Identifier: Apache-2.0
"""The last look: a short real run, float and quantized side by side, before anything is written.

Layers are solved one by one on what calibration saw. What only shows when they run together, or at
a step that calibration did not visit, shows here: numbers that are not finite, static activation
scales that are too small, a block that loses its signal, latents that grow or vanish. The layer at
fault is promoted, to int8 and then to the 16-bit original, and the reason is kept.
"""

from __future__ import annotations

import logging
import math
import statistics as numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from dtq.calibrate.collection import Statistics
from dtq.errors import NonFiniteError
from dtq.io.memory import paged_weights
from dtq.io.schema import MethodSpec
from dtq.models import Scan
from dtq.models.linears import matrix_of
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import finalize
from dtq.pipelines.loading import LoadedModel
from dtq.plan.layers import LayerPlan, Plan
from dtq.recipe.resolve import Recipe
from dtq.stages.layer_result import LayerReport
from dtq.stages.sanity_metrics import SanityReport, float_reference, measure
from dtq.stages.solve import build_quant_linear
from dtq.stages.solve_layer import solve_layer
from dtq.stages.transform_choice import choose_transform

log = logging.getLogger("dtq")

SATURATED = 0.02
"""Share of a static layer's inputs that may lie beyond its scale."""
LOST = 0.5
"""Relative squared error at which a layer has lost its signal (3 dB) ..."""
APART = 4.0
"""... if it is so many times the median of the model: a recipe may be coarse all over."""
DROP = 10.0
"""dB by which a block may be worse than the one before it, once it is below 3 dB."""
BLAMED = 0.05
"""Relative squared error of a layer from which it may be what ruins its block."""
VARIANCE = 4.0
"""Factor by which the variance of outputs and latents may grow or shrink."""
ROUNDS = 16
"""Promotions before giving up; each is followed by another look."""


@dataclass(frozen=True)
class Failure:
    """What is wrong with a layer.

    Attributes:
        layer: its name.
        why: in words, with the step.
    """

    layer: str
    why: str


@dataclass
class Promotion:
    """What was done about it: ``to`` is a weight format, or the float dtype."""

    layer: str
    to: str
    why: str


def sanity_check(
    loaded: LoadedModel,
    floats: Mapping[str, nn.Module],
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    reports: list[LayerReport],
    *,
    inputs: Sequence[dict[str, Any]] | None = None,
    progress: bool = True,
) -> tuple[Plan, dict[str, Any]]:
    """Run the quantized model beside the float one, and promote what fails.

    Nothing is changed when nothing is wrong.

    Args:
        source: the quantized model and its pipeline.
        floats: the float linears that were replaced, by name.
        scan, plan, recipe, statistics: what the model was quantized with.
        reports: of the layers; those of promoted ones are replaced.
        inputs: keyword arguments of forwards, for a bare transformer.
        progress: show a progress bar.

    Returns:
        The plan as it is now, and what was seen and done, as plain data.

    Raises:
        NumberError: the float model itself gives numbers that are not finite, or the quantized one
            does whatever is promoted.
    """
    model, promoted = loaded.model, []
    with paged_weights(model), tqdm(
        desc="sanity check", unit="call", disable=not progress, dynamic_ncols=True
    ) as bar:  # fmt: skip
        reference = float_reference(loaded, floats, recipe, inputs, bar.update)
        seen = measure(loaded, floats, recipe, reference, inputs, bar.update)
        for _ in range(ROUNDS):
            found = failures(seen)
            if not found:
                break
            done, plan = _promote(model, floats, scan, plan, recipe, statistics, reports, found[0])
            promoted.append(done)
            log.warning("sentinel: %s to %s: %s", done.layer, done.to, done.why)
            seen = measure(loaded, floats, recipe, reference, inputs, bar.update)
    if not all(map(math.isfinite, seen.variance)):
        raise NonFiniteError(
            f"{loaded.name}: the quantized model gives numbers that are not finite, and "
            f"{len(promoted)} promoted layers did not help; set DTQ_DEBUG_NAN=1, load it and "
            f"sample to see where. Try --dtype bf16"
        )
    for said in warnings(seen):
        log.warning("sentinel: %s", said)
    return plan, {**seen.to_json(), "promoted": [asdict(each) for each in promoted]}


def failures(report: SanityReport) -> list[Failure]:
    """What calls for a promotion, the gravest first; empty when the model is good."""
    found = [
        Failure(name, f"its output is not finite at call {call}")
        for name, call in list(report.broken.items())[:1]  # the others may only follow
    ]
    found += [
        Failure(name, f"{share:.1%} of its input is beyond its static scale at call {call}")
        for name, (share, call) in sorted(report.saturation.items(), key=lambda x: -x[1][0])
        if share > SATURATED
    ]
    lost = sorted(
        ((error, name, call) for error, name, call in _worst(report) if error > LOST), reverse=True
    )
    found += [
        Failure(name, f"relative output error {error:.2g} at call {call}")
        for error, name, call in lost
    ]
    for block, call, text in _drops(report):
        inside = [
            (error, name, at)
            for error, name, at in _worst(report)
            if at == call and error > BLAMED and name.startswith(f"{block}.")
        ]
        if inside:
            found.append(Failure(max(inside)[1], f"{text}, and it errs most in there"))
    return found


def warnings(report: SanityReport) -> list[str]:
    """What is strange and not the fault of one layer."""
    said = [text for _, _, text in _drops(report)]
    for what, values in (("outputs", report.variance), ("latents", report.latents)):
        wild = [i for i, v in enumerate(values) if not 1 / VARIANCE <= v <= VARIANCE]
        if wild:
            said.append(
                f"the variance of its {what} is {values[wild[0]]:.2g} times the float model's at "
                f"call {wild[0]}"
            )
    return said


def _drops(report: SanityReport) -> Iterator[tuple[str, int, str]]:
    """Blocks behind which the signal is lost and before which it was not: block, call, words."""
    names = list(report.snr)
    for before, name in zip(["", *names], names, strict=False):
        good = report.snr.get(before, [math.inf] * report.calls)
        for call, (first, then) in enumerate(zip(good, report.snr[name], strict=True)):
            if then < 3 and first - then > DROP:
                said = "" if first == math.inf else f", {first:.1f} dB before it"
                yield name, call, f"{name} has {then:.1f} dB of signal left at call {call}{said}"
                break


def _worst(report: SanityReport) -> Iterator[tuple[float, str, int]]:
    """Layers that stand out of the model in some call: error, name, call."""
    for call in range(report.calls):
        errors = {n: each[call] for n, each in report.errors.items() if call < len(each)}
        usual = numbers.median(errors.values()) if errors else 0.0
        for name, error in errors.items():
            if error > APART * usual:
                yield error, name, call


def _promote(
    model: nn.Module,
    floats: Mapping[str, nn.Module],
    scan: Scan,
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    reports: list[LayerReport],
    finding: Failure,
) -> tuple[Promotion, Plan]:
    """One step up: to int8 with scales per token, or back to the float layer."""
    name, layer, old = finding.layer, plan[finding.layer], floats[finding.layer]
    note = f"sentinel: {finding.why}"
    before = model.get_submodule(name)
    assert isinstance(before, QuantLinear)
    (report,) = (x for x in reports if x.name == name)
    raised = replace(
        layer, weight_format="int8-row", activation_format="none" if layer.activation_format == "none" else "int8-row", hadamard_block_size=1,
        pre_quant=False, rank=0, permutation=False, num_rotations=1, transform=MethodSpec("none"),
        solver=MethodSpec("rtn"), lowrank=MethodSpec("none"), format_candidates=(), note=note,
    )  # fmt: skip
    if raised.spec() == layer.spec():
        model.set_submodule(name, old)
        reports.remove(report)
        finalize(model, ())
        kept = LayerPlan(name, layer.role, layer.shape, note=note)
        dtype = str(next(old.parameters()).dtype).removeprefix("torch.")
        return Promotion(name, dtype, finding.why), plan.with_layers({name: kept})
    site = next(s.name for s in scan.input_groups for x in s.linears if x.name == name)
    stats = None if statistics is None else statistics.inputs.get(site)
    weight = matrix_of(old)
    result = solve_layer(raised, weight, choose_transform([raised], [weight], stats), stats, recipe)
    new = build_quant_linear(result, old, plan.bins, before.compute_dtype)
    new.set_clock(before.clock)
    model.set_submodule(name, new)
    finalize(model, ())
    result.report.promoted, result.report.error_before = True, report.error
    reports[reports.index(report)] = result.report
    return (
        Promotion(name, raised.weight_format, finding.why),
        plan.with_layers({name: replace(result.plan, note=note)}),
    )
