# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dtq
from dtq import checkpoint

QUICK = {"calibration": {"samples": 8, "batch": 4, "steps": 8, "bins": 4}}


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
    pipe = dtq.quantize(float_folder, "w4a8", progress=False, **QUICK)
    return checkpoint.write(pipe, folder)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)
