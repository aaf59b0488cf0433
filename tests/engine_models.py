# SPDX-License-Identifier: Apache-2.0
"""What the tests of every target share: tiny quantized models, and errors against the float one."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path

import tiny
import torch
from conftest import hasty
from torch import Tensor, nn

import dtq
from dtq.models.linears import matrix_of
from dtq.nn import QuantLinear
from dtq.pipelines.tracing import dummy_inputs

FAMILIES = ("dit", "flux", "sd3")
"""256 channels wide: a whole superblock of a K-quant, a whole block of ConvRot."""
ORIGINAL = ("flux", "sd3")
"""Those whose original files have other names than diffusers, and q, k and v in one tensor."""
THOROUGH = "DTQ_TEST_THOROUGH" in os.environ
"""The shipped recipe for every family, and every pair of family and recipe: for the numbers of docs/engines."""
ROWS = 4000
"""Inputs of a layer. Where an engine rounds tokens by another rule, the ratio of two errors on 96
inputs is 1.003 +- 0.008 by chance; on 4000 it is +- 0.001."""


@functools.cache
def quantized(
    family: str, recipe: str, target: str, shipped: bool | None = None, **overrides
) -> tuple[nn.Module, nn.Module]:
    """A float model, and the same quantized for a target, on random inputs.

    Args:
        family: of ``tiny.TRANSFORMERS``.
        recipe: its name.
        target: its name.
        shipped: use the recipe as it is; otherwise round to nearest, in a quarter of the time: codes and
            parameters of the same formats. None: DiT alone has the recipe as it is, if not :data:`THOROUGH`.
        overrides: of the recipe.
    """
    model = tiny.TRANSFORMERS[family](heads=8)
    if shipped is None:
        shipped = THOROUGH or family not in ORIGINAL
    made = dtq.quantize(
        copy.deepcopy(model),
        recipe if shipped else hasty(recipe, solver="rtn"),
        to=target,
        inputs=random_inputs(model),
        progress=False,
        sanity_check=False,
        **overrides,
    )
    return model, made


def random_inputs(model: nn.Module) -> list[dict]:
    """Of three calls at different timesteps."""
    return [dummy_inputs(model, 2, t, seed) for seed, t in enumerate((900, 500, 100))]


def output(model: nn.Module, inputs: dict) -> Tensor:
    """The output of one call."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def error(y: Tensor, reference: Tensor) -> float:
    """Relative squared error."""
    return float(
        (y.double() - reference.double()).square().sum() / reference.double().square().sum()
    )


def model_errors(
    model: nn.Module, *others: nn.Module, calls: int = 12, largest: int = 1000
) -> list[float]:
    """Sum over calls of the error of each of several models against the float one.

    A perturbation far below the error moves it up or down by chance; 24 samples average that out. An
    engine that rounds tokens by another rule has errors of its own, and needs more. ``largest`` is the
    largest timestep: FLUX multiplies it by 1000, and beyond 1 the sine of it hangs on the library.
    """
    errors = [0.0] * len(others)
    for seed in range(calls):
        step = 20 + 80 * seed % 960
        t = step if largest == 1000 else step * largest / 1000
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


def agreement(
    model: nn.Module, made: nn.Module, run_layer, engine: nn.Module, calls: int = 72
) -> tuple[float, float]:
    """Errors of an engine over those of dtq: the largest ratio of a layer, and that of the model.

    ``pytest -s`` prints them; they are the numbers of docs/engines.

    Args:
        model: the float model.
        made: quantized by dtq.
        run_layer: the output of the engine's layer, from a name and an input (rows, K).
        engine: the whole model, run by the engine.
        calls: of the whole model; few are enough where the engine rounds tokens as dtq does.
    """
    ratios = {}
    for name, layer in made.named_modules():
        if isinstance(layer, QuantLinear):
            x = layer_input(layer.in_features, ROWS)
            want = float_output(model, name, x)
            with torch.no_grad():
                own, theirs = error(layer(x), want), error(run_layer(name, x), want)
            assert 0 < own < 0.1, name
            ratios[name] = theirs / own
    assert len(ratios) > 8
    ours, theirs = model_errors(model, made, engine, calls=calls)
    assert ours > 0
    print(f"\n{type(model).__name__}: layers {max(ratios.values()):.4f}, model {theirs / ours:.4f}")
    return max(ratios.values()), theirs / ours


def stored_files(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of each file of a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name if path.is_dir() else "": file.read_bytes() for file in files}


def largest_file(path: Path) -> Path:
    """The file, or the largest of a folder."""
    return max(path.iterdir(), key=lambda f: f.stat().st_size) if path.is_dir() else path
