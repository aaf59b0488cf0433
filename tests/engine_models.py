# SPDX-License-Identifier: Apache-2.0
"""What the tests of every target share: tiny quantized models, and errors against the float one."""

from __future__ import annotations

import copy
import functools

import tiny
import torch
from torch import Tensor, nn

import dtq
from dtq.models.linears import matrix_of
from dtq.pipelines.tracing import dummy_inputs

FAMILIES = ("dit", "flux", "sd3")
ORIGINAL = ("flux", "sd3")
"""Those whose original files have other names than diffusers, and q, k and v in one tensor."""
"""256 channels wide: a whole superblock of a K-quant, a whole block of ConvRot."""


@functools.cache
def quantized(family: str, recipe: str, target: str, **overrides) -> tuple[nn.Module, nn.Module]:
    """A float model, and the same quantized for a target, on random inputs."""
    model = tiny.TRANSFORMERS[family](heads=8)
    inputs = [dummy_inputs(model, 2, t, seed) for seed, t in enumerate((900, 500, 100))]
    copied = copy.deepcopy(model)
    made = dtq.quantize(
        copied, recipe, to=target, inputs=inputs, progress=False, sanity_check=False, **overrides
    )
    return model, made


def output(model: nn.Module, inputs: dict) -> Tensor:
    """The output of one call."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def error(y: Tensor, reference: Tensor) -> float:
    """Relative squared error."""
    return float(
        (y.double() - reference.double()).square().sum() / reference.double().square().sum()
    )


def model_errors(model: nn.Module, *others: nn.Module) -> list[float]:
    """Sum over calls of the error of each of several models against the float one.

    A perturbation far below the error moves it up or down by chance; 24 samples average that out.
    """
    errors = [0.0] * len(others)
    for seed, t in enumerate(range(20, 980, 80)):
        inputs = dummy_inputs(model, 2, t, 100 + seed)
        want = output(model, inputs)
        for i, other in enumerate(others):
            errors[i] += error(output(other, inputs), want)
    return errors


def layer_input(columns: int, rows: int = 96, seed: int = 7) -> Tensor:
    """Rows with a mean and channels of different size, as inputs of a transformer have them."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp(0.7 * torch.randn(columns, generator=g))
    return torch.randn(rows, columns, generator=g) * size + 0.3


def float_output(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What the float layer of a name gives."""
    layer = model.get_submodule(name)
    with torch.no_grad():
        return x @ matrix_of(layer).T + (0 if layer.bias is None else layer.bias)
