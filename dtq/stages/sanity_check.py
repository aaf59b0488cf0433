# SPDX-License-Identifier: Apache-2.0
"""Stage: a short sampling run, float and quantized, before anything is written.

Layers are solved one at a time on the inputs of the calibration run. Some failures show only when
they run together, or at a step that calibration did not visit: values that are not finite, static
activation scales that are too small, a block that loses its signal, latents that grow or vanish.
The failing layer is promoted to int8, or to the first fallback of the run's target, then to the
float layer, and the report keeps the reason.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from dtq.engines import find_target
from dtq.errors import NonFiniteError
from dtq.io.memory import paged_weights
from dtq.models.linears import matrix_of
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import finalize
from dtq.plan.layers import LayerPlan, LayerSpec, misfit
from dtq.stages.joined_layers import names_in_one_matrix
from dtq.stages.run import Run
from dtq.stages.sanity_metrics import SanityReport, float_reference, measure
from dtq.stages.solve import build_quant_linear
from dtq.stages.solve_layer import TransformedInput, solve_layer
from dtq.stages.transform_choice import choose_transform

log = logging.getLogger("dtq")

SATURATED = 0.02
"""Largest share of a static layer's inputs beyond its scale."""
LOST = 0.5
"""Relative squared error at which a layer has lost its signal (3 dB) ..."""
OUTLIER = 4.0
"""... if it is above this multiple of the model's median, so that a coarse recipe passes."""
DROP = 10.0
"""Loss of signal-to-noise ratio in dB within one block, once it is below 3 dB."""
SUSPECT = 0.05
"""Relative squared error above which a layer may be the cause of its block's loss."""
VARIANCE = 4.0
"""Factor by which the variance of outputs and latents may grow or shrink."""
ROUNDS = 16
"""Largest number of promotions; the check is repeated after each."""


@dataclass(frozen=True)
class Failure:
    """A layer that fails, and why, with the call."""

    layer: str
    why: str


@dataclass
class Promotion:
    """A layer that was promoted ``to`` a weight format, or to the float dtype, and why."""

    layer: str
    to: str
    why: str

    def __str__(self) -> str:
        return f"promoted {self.layer} to {self.to}: {self.why}"


def sanity_check(run: Run) -> None:
    """Compare a short sampling run with the float model, and promote the layers that fail.

    Nothing is changed when nothing fails.

    Raises:
        NonFiniteError: the float model itself gives values that are not finite, or the quantized
            model does whatever is promoted.
    """
    if not run.check or not (run.has_data or run.statistics is not None):
        return
    promoted: list[Promotion] = []
    name = run.loaded.component or run.loaded.name
    with paged_weights(run.model), run.progress_bar("sanity check", unit="call") as bar:
        reference = float_reference(run, bar.update)
        if not reference.calls:  # the pipeline runs the layers of a text encoder one by one
            log.warning("sanity check: %s was not called as a whole, and is not checked", name)
            return
        report = measure(run, reference, bar.update)
        for _ in range(ROUNDS):
            if not (failed := failures(report)):
                break
            for failure in _with_its_matrix(run, failed[0]):
                promoted.append(_promote(run, failure))
                log.warning("sanity check: %s", promoted[-1])
            report = measure(run, reference, bar.update)
    if not all(map(math.isfinite, report.variance)):
        raise NonFiniteError(
            f"{run.loaded.name}: the quantized model gives values that are not finite, and "
            f"{len(promoted)} promoted layers did not help; set DTQ_DEBUG_NAN=1, load it and "
            f"sample to see where. Try --dtype bf16"
        )
    for message in warnings(report):
        log.warning("sanity check: %s", message)
    run.report.plan = run.plan
    run.report.sanity_check = {**report.to_json(), "promoted": [asdict(each) for each in promoted]}


def failures(report: SanityReport) -> list[Failure]:
    """Layers to promote, the gravest failure first; empty when the model passes."""
    first = list(report.broken.items())[:1]  # the others may be consequences
    failed = [Failure(name, f"its output is not finite at call {call}") for name, call in first]
    failed += [
        Failure(name, f"{share:.1%} of its input is beyond its static scale at call {call}")
        for name, (share, call) in sorted(report.saturation.items(), key=lambda x: -x[1][0])
        if share > SATURATED
    ]
    outliers = list(_outliers(report))
    failed += [
        Failure(name, f"relative output error {error:.2g} at call {call}")
        for error, name, call in sorted(outliers, reverse=True)
        if error > LOST
    ]
    for block, call, message in _drops(report):
        inside = [
            (error, name)
            for error, name, at in outliers
            if at == call and error > SUSPECT and name.startswith(f"{block}.")
        ]
        if inside:
            reason = f"{message}, and this layer has the largest error in the block"
            failed.append(Failure(max(inside)[1], reason))
    return failed


def warnings(report: SanityReport) -> list[str]:
    """Messages about what is unusual and not the fault of one layer."""
    messages = [message for _, _, message in _drops(report)]
    for what, values in (("outputs", report.variance), ("latents", report.latents)):
        wild = [i for i, v in enumerate(values) if not 1 / VARIANCE <= v <= VARIANCE]
        if wild:
            messages.append(
                f"the variance of its {what} is {values[wild[0]]:.2g} times the float model's at "
                f"call {wild[0]}"
            )
    return messages


def _drops(report: SanityReport) -> Iterator[tuple[str, int, str]]:
    """Blocks that lose the signal that the block before them had: block, call, message."""
    names = list(report.snr)
    for before, name in zip(["", *names], names, strict=False):
        unlimited = [math.inf] * report.calls
        pairs = zip(report.snr.get(before, unlimited), report.snr[name], strict=True)
        for call, (first, after) in enumerate(pairs):
            if after < 3 and first - after > DROP:
                start = "" if first == math.inf else f", {first:.1f} dB before it"
                yield name, call, f"{name} has {after:.1f} dB of signal left at call {call}{start}"
                break


def _outliers(report: SanityReport) -> Iterator[tuple[float, str, int]]:
    """Layers whose error is far above the median of a call: error, name, call."""
    for call in range(report.calls):
        errors = {n: each[call] for n, each in report.errors.items() if call < len(each)}
        median = statistics.median(errors.values()) if errors else 0.0
        for name, error in errors.items():
            if error > OUTLIER * median:
                yield error, name, call


def _with_its_matrix(run: Run, failure: Failure) -> list[Failure]:
    """A failure, and one for each layer that the run's target has in one matrix with its layer."""
    _, *others = names_in_one_matrix(failure.layer, run.joined)
    why = f"in one matrix with {failure.layer}: {failure.why}"
    return [failure, *(Failure(name, why) for name in others)]


def _promote(run: Run, failure: Failure) -> Promotion:
    """Promote a layer to a finer format, or back to the float layer."""
    name, layer, old = failure.layer, run.plan[failure.layer], run.floats[failure.layer]
    note = f"sanity check: {failure.why}"
    before = run.model.get_submodule(name)
    assert isinstance(before, QuantLinear)
    reports = run.report.layers
    (report,) = (x for x in reports if x.name == name)
    unquantized = LayerPlan(name, layer.role, layer.shape, note=note)
    raised = replace(unquantized, spec=_finer(run, layer))
    if raised.unquantized or raised.spec == layer.spec:
        run.model.set_submodule(name, old)
        reports.remove(report)
        finalize(run.model, ())
        run.plan = run.plan.with_layers({name: unquantized})
        run.promoted[name] = None
        dtype = str(next(old.parameters()).dtype).removeprefix("torch.")
        return Promotion(name, dtype, failure.why)
    weight = matrix_of(old)
    choice = choose_transform([raised], [weight], run.stats(run.scan.group_of(name)))
    result = solve_layer(raised, weight, TransformedInput.of(run, raised, choice, weight))
    new = build_quant_linear(result, old, run.plan.bins, before.compute_dtype)
    new.set_clock(before.clock, name)
    run.model.set_submodule(name, new)
    finalize(run.model, ())
    result.report.promoted, result.report.error_before = True, report.error
    reports[reports.index(report)] = result.report
    run.plan = run.plan.with_layers({name: replace(result.plan, note=note)})
    run.promoted[name] = replace(result, plan=run.plan[name])
    return Promotion(name, raised.weight_format, failure.why)


def _finer(run: Run, layer: LayerPlan) -> LayerSpec:
    """int8 with one scale per token, or what the target holds in its place; or no format."""
    wanted = LayerSpec("int8-row", "none" if layer.activation_format == "none" else "int8-row")
    if not run.target:
        return wanted
    limits = find_target(run.target).limits
    for name in limits.fallbacks:
        runs = wanted.activation_format in limits.formats[name]
        spec = LayerSpec(name, wanted.activation_format if runs else "none")
        if not misfit(name, layer.shape) and not limits.shape_reason(spec, layer.shape):
            return spec
    return LayerSpec("", "none")
