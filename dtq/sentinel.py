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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from dtq.calibrate.calls import Recorded, first_tensor, relative_error, replay
from dtq.calibrate.engine import Statistics
from dtq.calibrate.record import sample_calls
from dtq.documents import finite
from dtq.errors import NumberError
from dtq.families import Scan, blocks_of
from dtq.nn.linear import QuantLinear, rows_of
from dtq.nn.swap import finish, placed
from dtq.paging import paged, release
from dtq.plan import Call, LayerPlan, Plan
from dtq.recipe import Recipe
from dtq.solve import built, choose, solve
from dtq.solved import LayerReport
from dtq.source import Source

log = logging.getLogger("dtq")

STEPS = 8
"""Sampler steps of the run, or the recipe's where they are fewer: over the whole trajectory."""
ROWS = 64
"""Rows of a layer's input, and of a block's output, that are compared in a call."""
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
class Finding:
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


@dataclass
class Look:
    """What a run showed.

    Attributes:
        calls: of the transformer that were compared.
        snr: dB of each block's output against the float model's, per call, same inputs.
        errors: relative squared error of each layer on its own input, per call.
        saturation: largest share of inputs beyond a static scale, and the call, per layer.
        broken: layers whose output was not finite though their input was, and the call.
        variance: of the output over the float model's, per call.
        latents: the same of the latents, both models sampling on their own; empty without a
            pipeline.
    """

    calls: int
    snr: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    saturation: dict[str, tuple[float, int]] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    variance: list[float] = field(default_factory=list)
    latents: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data: what is not finite is null."""
        data: dict[str, Any] = finite({
            "calls": self.calls,
            "block_snr_db": self.snr,
            "saturation": {name: share for name, (share, _) in self.saturation.items() if share},
            "variance": self.variance,
            "latent_variance": self.latents,
        })  # fmt: skip
        return data


def watch(
    source: Source,
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
    model, promoted = source.model, []
    with paged(model), tqdm(
        desc="sentinel", unit="call", disable=not progress, dynamic_ncols=True
    ) as bar:  # fmt: skip
        reference = _reference(source, floats, recipe, inputs, bar.update)
        seen = look(source, floats, recipe, reference, inputs, bar.update)
        for _ in range(ROUNDS):
            found = findings(seen)
            if not found:
                break
            done, plan = _promote(model, floats, scan, plan, recipe, statistics, reports, found[0])
            promoted.append(done)
            log.warning("sentinel: %s to %s: %s", done.layer, done.to, done.why)
            seen = look(source, floats, recipe, reference, inputs, bar.update)
    if not all(map(math.isfinite, seen.variance)):
        raise NumberError(
            f"{source.name}: the quantized model gives numbers that are not finite, and "
            f"{len(promoted)} promoted layers did not help; set DTQ_DEBUG_NAN=1, load it and "
            f"sample to see where. Try --dtype bf16"
        )
    for said in complaints(seen):
        log.warning("sentinel: %s", said)
    return plan, {**seen.to_json(), "promoted": [asdict(each) for each in promoted]}


@dataclass
class _Reference:
    """The float run: its calls, and sampled rows of every block's output, per call."""

    calls: list[Recorded]
    blocks: list[dict[str, Tensor]]


def _short(recipe: Recipe) -> Any:
    """The calibration's settings for a run of few steps and one picture."""
    how = recipe.calibration
    return replace(how, samples=1, batch=1, bins=4, steps=min(how.steps or STEPS, STEPS))


def _sampled(
    source: Source, recipe: Recipe, inputs: Sequence[dict[str, Any]] | None
) -> list[Recorded]:
    few = None if inputs is None else list(inputs)[:: -(-len(inputs) // STEPS)]
    return sample_calls(source, _short(recipe), 1, inputs=few)


def _reference(
    source: Source,
    floats: Mapping[str, nn.Module],
    recipe: Recipe,
    inputs: Sequence[dict[str, Any]] | None,
    tick: Callable[[], object],
) -> _Reference:
    """One short run of the float model; its linears stand in their old places meanwhile."""
    blocks: list[dict[str, Tensor]] = []
    with placed(source.model, floats), _blocks(source.model, blocks, tick):
        calls = _sampled(source, recipe, inputs)
    for i, call in enumerate(calls):
        if not call.output.isfinite().all():
            bad = next((n for n, rows in blocks[i].items() if not rows.isfinite().all()), "its end")
            raise NumberError(
                f"{source.name}: the float model itself gives numbers that are not finite at step "
                f"{call.step} (timestep {call.timestep:g}), first seen behind {bad}. Use another "
                f"dtype: --dtype bf16"
            )
    return _Reference(calls, blocks)


def look(
    source: Source,
    floats: Mapping[str, nn.Module],
    recipe: Recipe,
    reference: _Reference,
    inputs: Sequence[dict[str, Any]] | None,
    tick: Callable[[], object],
) -> Look:
    """The quantized model on the calls of the float one, and sampling on its own."""
    model, seen = source.model, Look(len(reference.calls))
    blocks: list[dict[str, Tensor]] = []
    with _blocks(model, blocks, tick), _layers(model, floats, seen) as count:
        for i, call in enumerate(reference.calls):
            count(i)
            output = replay(model, call)
            seen.variance.append(_ratio(output, call.output))
    for got, want in zip(blocks, reference.blocks, strict=True):
        for name, rows in want.items():
            error = relative_error(got[name], rows) if name in got else 0.0
            seen.snr.setdefault(name, []).append(-10 * math.log10(max(error, 1e-30)))
    if source.pipeline is not None and inputs is None:
        own = _sampled(source, recipe, None)
        pairs = zip(own, reference.calls, strict=False)
        seen.latents = [_ratio(a.latents, b.latents) for a, b in pairs]
    return seen


def findings(seen: Look) -> list[Finding]:
    """What calls for a promotion, the gravest first; empty when the model is good."""
    found = [
        Finding(name, f"its output is not finite at call {call}")
        for name, call in list(seen.broken.items())[:1]  # the others may only follow
    ]
    found += [
        Finding(name, f"{share:.1%} of its input is beyond its static scale at call {call}")
        for name, (share, call) in sorted(seen.saturation.items(), key=lambda x: -x[1][0])
        if share > SATURATED
    ]
    lost = sorted(
        ((error, name, call) for error, name, call in _worst(seen) if error > LOST), reverse=True
    )
    found += [
        Finding(name, f"relative output error {error:.2g} at call {call}")
        for error, name, call in lost
    ]
    for block, call, text in _drops(seen):
        inside = [
            (error, name, at)
            for error, name, at in _worst(seen)
            if at == call and error > BLAMED and name.startswith(f"{block}.")
        ]
        if inside:
            found.append(Finding(max(inside)[1], f"{text}, and it errs most in there"))
    return found


def complaints(seen: Look) -> list[str]:
    """What is strange and not the fault of one layer."""
    said = [text for _, _, text in _drops(seen)]
    for what, values in (("outputs", seen.variance), ("latents", seen.latents)):
        wild = [i for i, v in enumerate(values) if not 1 / VARIANCE <= v <= VARIANCE]
        if wild:
            said.append(
                f"the variance of its {what} is {values[wild[0]]:.2g} times the float model's at "
                f"call {wild[0]}"
            )
    return said


def _drops(seen: Look) -> Iterator[tuple[str, int, str]]:
    """Blocks behind which the signal is lost and before which it was not: block, call, words."""
    names = list(seen.snr)
    for before, name in zip(["", *names], names, strict=False):
        good = seen.snr.get(before, [math.inf] * seen.calls)
        for call, (first, then) in enumerate(zip(good, seen.snr[name], strict=True)):
            if then < 3 and first - then > DROP:
                said = "" if first == math.inf else f", {first:.1f} dB before it"
                yield name, call, f"{name} has {then:.1f} dB of signal left at call {call}{said}"
                break


def _worst(seen: Look) -> Iterator[tuple[float, str, int]]:
    """Layers that stand out of the model in some call: error, name, call."""
    for call in range(seen.calls):
        errors = {n: each[call] for n, each in seen.errors.items() if call < len(each)}
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
    finding: Finding,
) -> tuple[Promotion, Plan]:
    """One step up: to int8 with scales per token, or back to the float layer."""
    name, layer, old = finding.layer, plan[finding.layer], floats[finding.layer]
    note = f"sentinel: {finding.why}"
    before = model.get_submodule(name)
    assert isinstance(before, QuantLinear)
    (report,) = (x for x in reports if x.name == name)
    raised = replace(
        layer, weights="int8-row", acts="none" if layer.acts == "none" else "int8-row", block=1,
        pre_quant=False, rank=0, permute=False, turns=1, transform=Call("none"),
        solver=Call("rtn"), lowrank=Call("none"), choose=(), note=note,
    )  # fmt: skip
    if raised.runtime() == layer.runtime():
        model.set_submodule(name, old)
        reports.remove(report)
        finish(model, ())
        kept = LayerPlan(name, layer.role, layer.shape, note=note)
        dtype = str(next(old.parameters()).dtype).removeprefix("torch.")
        return Promotion(name, dtype, finding.why), plan.with_layers({name: kept})
    site = next(s.name for s in scan.sites for x in s.linears if x.name == name)
    stats = None if statistics is None else statistics.sites.get(site)
    weight = _weight(old)
    result = solve(raised, weight, choose([raised], [weight], stats), stats, recipe)
    new = built(result, old, plan.bins, before.compute_dtype)
    new.hear(before.clock)
    model.set_submodule(name, new)
    finish(model, ())
    result.report.promoted, result.report.error_before = True, report.error
    reports[reports.index(report)] = result.report
    return (
        Promotion(name, raised.weights, finding.why),
        plan.with_layers({name: replace(result.plan, note=note)}),
    )


@contextmanager
def _blocks(
    model: nn.Module, calls: list[dict[str, Tensor]], tick: Callable[[], object]
) -> Iterator[None]:
    """Collect sampled rows of every block's output, a mapping per call of the model."""

    def begin(module: nn.Module, args: Any) -> None:
        calls.append({})
        tick()

    def end(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            rows = first_tensor(output).detach()
            rows = rows.reshape(-1, rows.shape[-1])
            calls[-1][name] = rows[:: _stride(len(rows))].float().cpu()

        return hook

    handles = [model.register_forward_pre_hook(begin)]
    for prefix in blocks_of(model):
        name = prefix.removesuffix(".")
        handles.append(model.get_submodule(name).register_forward_hook(end(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _layers(
    model: nn.Module, floats: Mapping[str, nn.Module], seen: Look
) -> Iterator[Callable[[int], None]]:
    """Compare every quantized layer with its float one on the input that it gets."""
    now = [0]

    def hook_of(name: str, old: nn.Module) -> Callable[..., None]:
        def hook(module: QuantLinear, args: Any, output: Tensor) -> None:
            call = now[0]
            x, y = rows_of(old, args[0]), rows_of(old, output)
            step = _stride(len(x))
            x, y = x[::step].detach(), y[::step].detach().float()
            if not x.isfinite().all():
                return  # the fault is before it
            bias = None if old.bias is None else old.bias.detach().float()  # type: ignore[operator, union-attr]
            want = F.linear(x.float(), _weight(old).to(x.device), bias)
            release([old.weight])  # type: ignore[list-item]
            if not output.isfinite().all():
                seen.broken.setdefault(name, call)
            elif bool(want.square().sum() > 0):
                seen.errors.setdefault(name, [0.0] * seen.calls)[call] = relative_error(y, want)
            if module.task.acts.static:
                turned = module.transform().x(x.float()).abs()
                beyond = turned > (module.task.acts.levels + 0.5) * module.step_scale()
                share = float(beyond.float().mean())
                seen.saturation[name] = max(seen.saturation.get(name, (0.0, 0)), (share, call))

        return hook

    handles = [
        layer.register_forward_hook(hook_of(name, floats[name]))
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLinear) and name in floats
    ]
    try:
        yield lambda call: now.__setitem__(0, call)
    finally:
        for handle in handles:
            handle.remove()


def _weight(layer: nn.Module) -> Tensor:
    """Float32 (N, K)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().flatten(1)


def _stride(rows: int) -> int:
    return max(1, -(-rows // ROWS))


def _ratio(got: Tensor, want: Tensor) -> float:
    """Variance of one over that of the other; NaN or infinite where numbers are."""
    if got.numel() < 2:
        return 1.0
    return float(got.double().var() / want.double().var().clamp(min=1e-300))
