# SPDX-License-Identifier: Apache-2.0
"""Quantize the autoencoder of a pipeline: 8-bit weights of convolutions and linears, no data."""

from __future__ import annotations

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
from dtq.models.linears import has_own_forward, is_linear, matrix_of, shape_of
from dtq.nn.conv import QuantConv, is_convolution, matrix_shape, reads_weight
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import finalize
from dtq.pipelines import prompts, sampling
from dtq.pipelines.recorded_calls import first_tensor
from dtq.pipelines.settings import SamplingSettings
from dtq.plan.layers import LayerPlan, LayerSpec, Plan
from dtq.recipe.selectors import excludes
from dtq.stages.float_model import kept_in_float

VAE_CHOICES = {"keep": "", "w8": "int8-row"}
"""How an autoencoder is stored: as it is, or with one scale per output channel."""


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
    calls = _decoded(pipeline, vae, settings)
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


def quantize_weights(model: nn.Module, name: str) -> int:
    """Round the weights of every convolution and linear to nearest; returns their number.

    These stay float: convolutions whose weight is computed, such as those with weight
    normalization; layers that use their weight in a forward of their own, and linears with any
    forward of their own; and layers that diffusers keeps in float32.

    Args:
        model: of diffusers, float; changed in place.
        name: weight format, a key of ``FORMATS`` that fits every shape.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    fmt, spec, plans = FORMATS[name], LayerSpec(name, "none"), []
    kept = kept_in_float(model)
    names = defaultdict(list)
    for path, old in model.named_modules(remove_duplicate=False):
        names[old].append(path)
    for path, old in list(model.named_modules()):
        new: QuantLinear | QuantConv
        if reads_weight(old) or any(excludes(pattern, path) for pattern in kept):
            continue
        if isinstance(old, nn.Linear) and has_own_forward(old):
            continue
        if is_linear(old) and isinstance(old._parameters.get("weight"), nn.Parameter):
            new = QuantLinear.in_place_of(old, spec, compute_dtype=dtype, device=old.weight.device)  # type: ignore[arg-type, union-attr]
            if isinstance(old.bias, Tensor):
                new.bias = nn.Parameter(old.bias.detach().to(dtype), requires_grad=False)
            shape = shape_of(old)
        elif is_convolution(old):
            new = QuantConv.in_place_of(old, spec, compute_dtype=dtype)
            shape = matrix_shape(old)
        else:
            continue
        weight = matrix_of(old)
        new.fill(fmt.pack(weight, fmt.compute_qparams(weight)))
        for name in names[old]:  # a module that is registered twice stays one module
            model.set_submodule(name, new.train(old.training))
        plans.append(LayerPlan(path, "other", shape, spec))
    finalize(model, ())
    attach_quantizer(model, Plan("w8", tuple(plans)), (), dtype, DTQConfig())
    return len(plans)


def _decoded(pipeline: Any, vae: Any, settings: SamplingSettings) -> list[Any]:
    """Arguments of the calls of ``vae.decode`` in one sampling run."""
    once = replace(settings, samples=1, batch_size=1)
    calls: list[Any] = []
    with _recorded(vae, calls), torch.no_grad():
        list(sampling.run_pipeline(pipeline, prompts.load(once.prompts, pipeline, 1), once))
    if not calls:
        raise InputError(f"{type(pipeline).__name__} did not call its autoencoder; leave --vae out")
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
