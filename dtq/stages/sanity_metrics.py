# SPDX-License-Identifier: Apache-2.0
"""What a short sampling run measures: the quantized model compared with the float one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dtq.errors import NonFiniteError
from dtq.io.memory import Mapped
from dtq.io.safe_parse import finite_or_null
from dtq.linalg.relative_error import relative_error
from dtq.models import blocks_of, is_text_encoder
from dtq.models.linears import input_of, matrix_of, rows_of
from dtq.nn.attention import float_attention
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import temporarily_replaced
from dtq.pipelines.recorded_calls import RecordedCall, first_tensor, replay
from dtq.pipelines.recording import sample_calls
from dtq.pipelines.settings import SamplingSettings
from dtq.recipe import Recipe
from dtq.stages.run import Run

STEPS = 8
"""Sampler steps of the run, or the recipe's where they are fewer, over the whole trajectory."""
ROWS = 64
"""Rows of a layer's input, and of a block's output, that are compared in one call."""

Tick = Callable[[], object]
"""Called once per call of the model, for a progress bar."""


@dataclass
class SanityReport:
    """Measurements of one run.

    Attributes:
        calls: number of transformer calls that were compared.
        snr: signal-to-noise ratio of each block's output in dB, per call, on the same inputs.
        errors: relative squared error of each layer on its own input, per call.
        saturation: largest share of inputs beyond a static scale, and the call, per layer.
        broken: layers whose output was not finite though their input was, and the call.
        variance: variance of the output over that of the float model, per call.
        latents: the same of the latents when both models sample on their own; empty without a
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
        """Plain data; numbers that are not finite are null."""
        return finite_or_null({
            "calls": self.calls,
            "block_snr_db": self.snr,
            "saturation": {name: share for name, (share, _) in self.saturation.items() if share},
            "variance": self.variance,
            "latent_variance": self.latents,
        })  # fmt: skip


@dataclass
class FloatReference:
    """The run of the float model: its calls, and sampled rows of every block's output per call."""

    calls: list[RecordedCall]
    blocks: list[dict[str, Tensor]]


def short_settings(recipe: Recipe) -> SamplingSettings:
    """The calibration settings with one sample and few sampler steps."""
    settings = recipe.calibration
    steps = min(settings.steps or STEPS, STEPS)
    return replace(settings, samples=1, batch_size=1, num_timestep_bins=4, steps=steps)


def _sampled(run: Run, inputs: Sequence[dict[str, Any]] | None) -> list[RecordedCall]:
    few = None if inputs is None else list(inputs)[:: -(-len(inputs) // STEPS)]
    short = short_settings(run.recipe)
    every_step = replace(short, steps=run.recipe.calibration.steps)
    # a transformer of a part of the trajectory may have none of few steps
    calls = (sample_calls(run.loaded, how, 1, inputs=few) for how in (short, every_step))
    return next(filter(None, calls), [])


def float_reference(run: Run, tick: Tick) -> FloatReference:
    """One short run of the float model, with the float linears back in their places.

    Raises:
        NonFiniteError: the float model gives values that are not finite; the message says where.
    """
    blocks: list[dict[str, Tensor]] = []
    with ExitStack() as stack:
        stack.enter_context(temporarily_replaced(run.model, run.floats))
        stack.enter_context(float_attention(run.model))
        stack.enter_context(_blocks(run.model, blocks, tick))
        calls = _sampled(run, run.inputs)
    for i, call in enumerate(calls):
        if not call.output.isfinite().all():
            bad = next((n for n, rows in blocks[i].items() if not rows.isfinite().all()), "its end")
            raise NonFiniteError(
                f"{run.loaded.name}: the float model itself gives values that are not finite at "
                f"step {call.step} (timestep {call.timestep:g}), first seen behind {bad}. Use "
                f"another dtype: --dtype bf16"
            )
    return FloatReference(calls, blocks)


def measure(run: Run, reference: FloatReference, tick: Tick) -> SanityReport:
    """Compare the quantized model with the float one on the same calls, and sampling on its own."""
    model, report = run.model, SanityReport(len(reference.calls))
    blocks: list[dict[str, Tensor]] = []
    with _blocks(model, blocks, tick), _layers(run, report, blocks):
        for call in reference.calls:
            report.variance.append(_ratio(replay(model, call), call.output))
    for got, want in zip(blocks, reference.blocks, strict=True):
        for name, rows in want.items():
            error = relative_error(got[name], rows) if name in got else 0.0
            report.snr.setdefault(name, []).append(-10 * math.log10(max(error, 1e-30)))
    # a text encoder has no latents: token ids come first
    if run.loaded.pipeline is not None and run.inputs is None and not is_text_encoder(model):
        pairs = zip(_sampled(run, None), reference.calls, strict=False)
        report.latents = [_ratio(a.latents, b.latents) for a, b in pairs]
    return report


@contextmanager
def _blocks(model: nn.Module, calls: list[dict[str, Tensor]], tick: Tick) -> Iterator[None]:
    """Collect sampled rows of every block's output, a mapping per call of the model."""

    def begin(module: nn.Module, args: Any) -> None:
        calls.append({})
        tick()

    def end(name: str, module: nn.Module, args: Any, output: Any) -> None:
        rows = first_tensor(output).detach()
        rows = rows.reshape(-1, rows.shape[-1])
        if calls:  # empty where the model is not called as a whole
            calls[-1][name] = rows[:: _stride(len(rows))].float().cpu()

    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(begin))
        for prefix in blocks_of(model):
            name = prefix.removesuffix(".")
            block = model.get_submodule(name)
            hooks.enter_context(block.register_forward_hook(partial(end, name)))
        yield


@contextmanager
def _layers(run: Run, report: SanityReport, calls: Sequence[object]) -> Iterator[None]:
    """Compare every quantized layer with its float one on the input that it gets.

    Args:
        run: has the model and its float layers.
        report: is added to.
        calls: one entry for each call of the model so far, the present one included.
    """
    mapped = Mapped()

    def compare(
        name: str, old: nn.Module, module: QuantLinear, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        call = len(calls) - 1
        x, y = rows_of(old, input_of(args, kwargs)), rows_of(old, output)
        step = _stride(len(x))
        x, y = x[::step].detach(), y[::step].detach().float()
        if not x.isfinite().all():
            return  # the fault is before it
        bias = None if old.bias is None else old.bias.detach().float()  # type: ignore[operator, union-attr]
        want = F.linear(x.float(), matrix_of(old).to(x.device), bias)
        mapped.release([old.weight])  # type: ignore[list-item]
        if not output.isfinite().all():
            report.broken.setdefault(name, call)
        elif bool(want.square().sum() > 0):
            report.errors.setdefault(name, [0.0] * report.calls)[call] = relative_error(y, want)
        if module.problem.activation_format.static:
            transformed = module.transform().x(x.float()).abs()
            largest = module.problem.activation_format.qmax + 0.5
            beyond = transformed > largest * module.step_scale()
            share = float(beyond.float().mean())
            report.saturation[name] = max(report.saturation.get(name, (0.0, 0)), (share, call))

    with ExitStack() as hooks:
        for name, layer in run.model.named_modules():
            if isinstance(layer, QuantLinear) and name in run.floats:
                hook = partial(compare, name, run.floats[name])
                hooks.enter_context(layer.register_forward_hook(hook, with_kwargs=True))
        yield


def _stride(rows: int) -> int:
    return max(1, -(-rows // ROWS))


def _ratio(got: Tensor, want: Tensor) -> float:
    """Variance of one over that of the other; NaN or infinite where numbers are."""
    if got.numel() < 2:
        return 1.0
    return float(got.double().var() / want.double().var().clamp(min=1e-300))
