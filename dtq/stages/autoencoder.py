# SPDX-License-Identifier: Apache-2.0
"""Quantize the autoencoder of a pipeline: 8-bit weights of convolutions and linears, no data."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dtq.checkpoint.config import DTQConfig
from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.integrations.diffusers import attach_quantizer
from dtq.linalg.relative_error import relative_error
from dtq.models.linears import (
    has_own_forward,
    is_convolution,
    is_linear,
    matrix_of,
    matrix_shape,
    reads_weight,
    shape_of,
)
from dtq.nn.conv import QuantConv
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import finalize
from dtq.pipelines import prompts, sampling
from dtq.pipelines.recorded_calls import first_tensor
from dtq.pipelines.recorded_sampling import RecordedSampling
from dtq.pipelines.settings import SamplingSettings
from dtq.plan.layers import LayerPlan, LayerSpec, Plan
from dtq.recipe.selectors import excludes
from dtq.stages.float_model import kept_in_float, tied_weights

VAE_CHOICES = {"keep": "", "w8": "int8-row"}
"""How an autoencoder is stored: as it is, or with one scale per output channel."""


NOISE = 1e-3
"""Relative squared error of the noise in the latents that :func:`latent_error` compares with."""
NOISE_SEED = 0x6E6F6973
"""Of that noise. Unlike seeds of samplers: the noise that made the latents is not independent of
them. The generator reads 32 bits of it."""


def quantize_autoencoder(pipeline: Any, choice: str, settings: SamplingSettings) -> dict[str, Any]:
    """Quantize the weights of ``pipeline.vae`` in place, and measure what that changes.

    Args:
        pipeline: of diffusers.
        choice: a key of ``VAE_CHOICES``.
        settings: how to sample the latents that are decoded before and after.

    Returns:
        The report: format, number of layers, bytes before and after, and ``psnr`` in dB of the
        decodes of the same latents; None if they are equal.

    Raises:
        InputError: as :func:`check_vae`; or the pipeline decodes nothing.
    """
    if choice == "keep":
        return {}
    check_vae(pipeline, choice)
    vae = pipeline.vae
    once = replace(settings, samples=1, batch_size=1)
    calls = _decoded(pipeline, vae, prompts.load(once.prompts, pipeline, 1), once)
    if not calls:
        raise InputError(f"{type(pipeline).__name__} did not call its autoencoder; leave --vae out")
    with torch.no_grad():
        before = [first_tensor(vae.decode(*args, **kwargs)).float() for args, kwargs in calls]
        size = _bytes(vae)
        layers = quantize_weights(vae, VAE_CHOICES[choice])
        after = [first_tensor(vae.decode(*args, **kwargs)).float() for args, kwargs in calls]
    report = {
        "format": VAE_CHOICES[choice],
        "layers": layers,
        "bytes_before": size,
        "bytes": _bytes(vae),
        "psnr": _psnr(before, after),
    }
    vae.hf_quantizer.report = report
    return report


def check_vae(pipeline: Any, choice: str) -> None:
    """Check, before any work, that the autoencoder of a pipeline can be quantized.

    Raises:
        InputError: no such choice; no autoencoder, or a quantized one.
    """
    if choice not in VAE_CHOICES:
        raise InputError(f"vae {choice!r}: expected {', '.join(VAE_CHOICES)}")
    if choice == "keep":
        return
    vae = getattr(pipeline, "vae", None)
    if not isinstance(vae, nn.Module) or not hasattr(vae, "decode"):
        raise InputError(f"{type(pipeline).__name__} has no autoencoder named vae; leave --vae out")
    if getattr(vae, "is_quantized", False):
        raise InputError(f"the autoencoder of {type(pipeline).__name__} is quantized already")


def weights_plan(model: nn.Module, name: str) -> Plan:
    """Which layers of an autoencoder are quantized: convolutions and linears.

    These stay float: convolutions whose weight is computed, such as those with weight
    normalization; layers that use their weight in a forward of their own, and linears with any
    forward of their own; and layers that diffusers keeps in float32.

    Args:
        model: of diffusers, float, on any device.
        name: weight format, a key of ``FORMATS`` that fits every shape.
    """
    kept, layers = (*kept_in_float(model), *tied_weights(model)), []
    for path, old in model.named_modules():
        if reads_weight(old) or any(excludes(pattern, path) for pattern in kept):
            continue
        if isinstance(old, nn.Linear) and has_own_forward(old):
            continue
        if is_linear(old) and isinstance(old._parameters.get("weight"), nn.Parameter):
            shape = shape_of(old)
        elif is_convolution(old):
            shape = matrix_shape(old)
        else:
            continue
        layers.append(LayerPlan(path, "other", shape, LayerSpec(name, "none")))
    return Plan("w8", tuple(layers))


def quantize_weights(model: nn.Module, name: str) -> int:
    """Round the weights of every layer of :func:`weights_plan` to nearest; returns their number.

    Args:
        model: of diffusers, float; changed in place.
        name: weight format, a key of ``FORMATS`` that fits every shape.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    fmt, plan = FORMATS[name], weights_plan(model, name)
    names = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        names[module].append(path)
    for layer in plan.layers:
        old: Any = model.get_submodule(layer.name)
        new: QuantLinear | QuantConv
        if is_linear(old):
            device = old.weight.device
            new = QuantLinear.in_place_of(old, layer.spec, compute_dtype=dtype, device=device)
            if isinstance(old.bias, Tensor):
                new.bias = nn.Parameter(old.bias.detach().to(dtype), requires_grad=False)
        else:
            new = QuantConv.in_place_of(old, layer.spec, compute_dtype=dtype)
        weight = matrix_of(old)
        new.fill(fmt.pack(weight, fmt.compute_qparams(weight)))
        for path in names[old]:  # a module that is registered twice stays one module
            model.set_submodule(path, new.train(old.training))
    finalize(model, ())
    attach_quantizer(model, plan, (), dtype, DTQConfig())
    return len(plan.layers)


@torch.no_grad()
def latent_error(recorded: RecordedSampling, name: str) -> float | None:
    """How far 8-bit weights change the decodes, as an error of the latents that are decoded.

    The relative squared error of the decodes, divided by what the float autoencoder makes of random
    noise in the latents, relative to that noise. So it can be added to errors of a denoiser.

    Args:
        recorded: sampling of the float pipeline; its latents are decoded.
        name: weight format.

    Returns:
        The error; None if the pipeline decodes nothing with its autoencoder.
    """
    pipeline: Any = recorded.loaded.pipeline
    with recorded.answered():
        calls = _decoded(pipeline, pipeline.vae, recorded.requests, recorded.settings)
    if not calls:
        return None
    twin = copy.deepcopy(pipeline.vae)
    quantize_weights(twin, name)
    rng = torch.Generator().manual_seed(NOISE_SEED)

    def disturbed(latents: Tensor) -> Tensor:
        noise = torch.randn(latents.shape, generator=rng).to(latents)
        return latents + noise * (NOISE**0.5 * latents.float().square().mean().sqrt()).to(latents)

    changed = lost = 0.0
    for (latents, *args), kwargs in calls:
        want = first_tensor(pipeline.vae.decode(latents, *args, **kwargs))
        changed += relative_error(first_tensor(twin.decode(latents, *args, **kwargs)), want)
        again = pipeline.vae.decode(disturbed(latents), *args, **kwargs)
        lost += relative_error(first_tensor(again), want)
    return NOISE * changed / lost if lost else 0.0


def _decoded(
    pipeline: Any, vae: Any, requests: prompts.Requests, settings: SamplingSettings
) -> list[Any]:
    """Arguments of the calls of ``vae.decode`` in one sampling run."""
    calls: list[Any] = []
    with _recorded(vae, calls), torch.no_grad():
        list(sampling.run_pipeline(pipeline, requests, settings))
    return calls


@contextmanager
def _recorded(vae: Any, calls: list[Any]) -> Iterator[None]:
    decode = vae.decode

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return decode(*args, **kwargs)

    vae.decode = record
    try:
        yield
    finally:
        del vae.decode


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _psnr(before: list[Tensor], after: list[Tensor]) -> float | None:
    """Peak signal-to-noise ratio in dB of decodes, whose values go from -1 to 1."""
    pairs = list(zip(before, after, strict=True))
    total = sum(float((b.clamp(-1, 1) - a.clamp(-1, 1)).square().sum()) for b, a in pairs)
    mean = total / sum(b.numel() for b in before)
    return 10 * math.log10(4 / mean) if mean else None
