# SPDX-License-Identifier: Apache-2.0
"""What a short real run shows: the quantized model beside the float one, on the same calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dtq.errors import NonFiniteError
from dtq.io.memory import Mapped
from dtq.io.safe_parse import finite_or_null
from dtq.models import blocks_of
from dtq.models.linears import matrix_of, rows_of
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import temporarily_replaced
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.recorded_calls import RecordedCall, first_tensor, relative_error, replay
from dtq.pipelines.recording import sample_calls
from dtq.pipelines.settings import SamplingSettings
from dtq.recipe.resolve import Recipe

STEPS = 8
"""Sampler steps of the run, or the recipe's where they are fewer: over the whole trajectory."""
ROWS = 64
"""Rows of a layer's input, and of a block's output, that are compared in a call."""


@dataclass
class SanityReport:
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
        data: dict[str, Any] = finite_or_null({
            "calls": self.calls,
            "block_snr_db": self.snr,
            "saturation": {name: share for name, (share, _) in self.saturation.items() if share},
            "variance": self.variance,
            "latent_variance": self.latents,
        })  # fmt: skip
        return data


@dataclass
class FloatReference:
    """The float run: its calls, and sampled rows of every block's output, per call."""

    calls: list[RecordedCall]
    blocks: list[dict[str, Tensor]]


def short(recipe: Recipe) -> SamplingSettings:
    """The calibration's settings for the look's own runs: few steps, one picture."""
    how = recipe.calibration
    return replace(
        how, samples=1, batch_size=1, num_timestep_bins=4, steps=min(how.steps or STEPS, STEPS)
    )


def _sampled(
    loaded: LoadedModel, recipe: Recipe, inputs: Sequence[dict[str, Any]] | None
) -> list[RecordedCall]:
    few = None if inputs is None else list(inputs)[:: -(-len(inputs) // STEPS)]
    return sample_calls(loaded, short(recipe), 1, inputs=few)


def float_reference(
    loaded: LoadedModel,
    floats: Mapping[str, nn.Module],
    recipe: Recipe,
    inputs: Sequence[dict[str, Any]] | None,
    tick: Callable[[], object],
) -> FloatReference:
    """One short run of the float model; its linears stand in their old places meanwhile.

    Args:
        source: the quantized model and its pipeline.
        floats: the float linears that were replaced, by name.
        recipe: for its calibration.
        inputs: keyword arguments of forwards, for a bare transformer.
        tick: told of every call.

    Raises:
        NumberError: numbers of the float model are not finite; says where.
    """
    blocks: list[dict[str, Tensor]] = []
    with temporarily_replaced(loaded.model, floats), _blocks(loaded.model, blocks, tick):
        calls = _sampled(loaded, recipe, inputs)
    for i, call in enumerate(calls):
        if not call.output.isfinite().all():
            bad = next((n for n, rows in blocks[i].items() if not rows.isfinite().all()), "its end")
            raise NonFiniteError(
                f"{loaded.name}: the float model itself gives numbers that are not finite at step "
                f"{call.step} (timestep {call.timestep:g}), first seen behind {bad}. Use another "
                f"dtype: --dtype bf16"
            )
    return FloatReference(calls, blocks)


def measure(
    loaded: LoadedModel,
    floats: Mapping[str, nn.Module],
    recipe: Recipe,
    reference: FloatReference,
    inputs: Sequence[dict[str, Any]] | None,
    tick: Callable[[], object],
) -> SanityReport:
    """The quantized model on the calls of the float one, and sampling on its own.

    Args:
        source, floats, recipe, inputs, tick: as for :func:`reference_of`.
        reference: the calls.
    """
    model, seen = loaded.model, SanityReport(len(reference.calls))
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
    if loaded.pipeline is not None and inputs is None:
        own = _sampled(loaded, recipe, None)
        pairs = zip(own, reference.calls, strict=False)
        seen.latents = [_ratio(a.latents, b.latents) for a, b in pairs]
    return seen


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
    model: nn.Module, floats: Mapping[str, nn.Module], report: SanityReport
) -> Iterator[Callable[[int], None]]:
    """Compare every quantized layer with its float one on the input that it gets."""
    now, mapped = [0], Mapped()

    def hook_of(name: str, old: nn.Module) -> Callable[..., None]:
        def hook(module: QuantLinear, args: Any, output: Tensor) -> None:
            call = now[0]
            x, y = rows_of(old, args[0]), rows_of(old, output)
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
                turned = module.transform().x(x.float()).abs()
                beyond = (
                    turned > (module.problem.activation_format.qmax + 0.5) * module.step_scale()
                )
                share = float(beyond.float().mean())
                report.saturation[name] = max(report.saturation.get(name, (0.0, 0)), (share, call))

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


def _stride(rows: int) -> int:
    return max(1, -(-rows // ROWS))


def _ratio(got: Tensor, want: Tensor) -> float:
    """Variance of one over that of the other; NaN or infinite where numbers are."""
    if got.numel() < 2:
        return 1.0
    return float(got.double().var() / want.double().var().clamp(min=1e-300))
