# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from dtq.checkpoint import writer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dtq
from dtq.formats import vq
from dtq.io.schema import MethodSpec
from dtq.kernels import CPU
from dtq.kernels.compile import cpu
from dtq.recipe import Recipe

QUICK = {"calibration": {"samples": 8, "batch_size": 4, "steps": 8, "num_timestep_bins": 4}}


def hasty(name: str, **overrides) -> Recipe:
    """A shipped recipe with every method in place but little patience: for tests of the path."""
    recipe = Recipe.load(name, **{**QUICK, **overrides})

    def call(was: MethodSpec, **knobs) -> MethodSpec:
        return MethodSpec(was.name, tuple(sorted({**dict(was.knobs), **knobs}.items())))

    if recipe.transform.name == "search":
        recipe = replace(
            recipe, transform=call(recipe.transform, step=0.25, num_rows=64, max_error_ratio=1.0)
        )
    if recipe.lowrank.name != "none":
        recipe = replace(recipe, lowrank=call(recipe.lowrank, iterations=1))
    if recipe.finetune.name != "none":
        recipe = replace(recipe, finetune=call(recipe.finetune, steps=6))
    return replace(recipe, allocate=replace(recipe.allocate, num_inputs=2))


@pytest.fixture
def few_vectors(monkeypatch):
    """Codebooks are learned from few vectors: for tests of the path."""
    monkeypatch.setattr(vq, "SAMPLE", 2**12)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of this run, the same for every process of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory) -> Path:
    """A tiny float DiT pipeline on disk."""
    folder = tmp_path_factory.mktemp("float") / "pipe"
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory, float_folder) -> Path:
    """The same, quantized to w4a8 and saved. Copy it before damaging it."""
    folder = tmp_path_factory.mktemp("quantized") / "pipe"
    pipe = dtq.quantize(float_folder, hasty("w4a8"), progress=False)
    return writer.write(pipe, folder)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def library():
    """The compiled CPU kernels."""
    if not CPU.load():
        pytest.skip(CPU.describe())


@pytest.fixture(params=cpu.ISAS)
def isa(request, library):
    """Every path that this machine has."""
    if cpu.use(request.param) != request.param:
        cpu.use(None)
        pytest.skip(f"no {request.param} on this CPU")
    yield request.param
    cpu.use(None)
