# SPDX-License-Identifier: Apache-2.0
"""The function that each process of ``test_parallel.py`` runs; processes are started with it alone."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch import nn

import dtq
from dtq.nn.slice import Slice
from dtq.nn.timestep_hook import install_clock
from dtq.parallel import load_sharded, shard
from dtq.pipelines.tracing import dummy_inputs
from dtq.plan.step_policy import StepPolicy

ROTATED = {"transform": "hadamard", "solver": "rtn", "correct_bias": False}
KINDS: dict[str, dict[str, Any]] = {
    "w8a8": {"weights": "int8-row", **ROTATED},
    "w4a8": {"weights": "int4-2l-g64", **ROTATED},
    "w4a16": {"weights": "int4-asym-g64", "activations": "none", **ROTATED},
    "static": {"weights": "int8-row", "activations": "int8-static-timestep", **ROTATED},
    "rows": {"weights": "int4-asym-row", **ROTATED},
    "e2m1": {"weights": "e2m1-row", "activations": "e2m1-row", **ROTATED},
    "groups": {"weights": "int4-g64", **ROTATED},
    "fp8": {"weights": "fp8-row", "activations": "fp8-row", **ROTATED},
    "nvfp4": {"weights": "nvfp4", "activations": "nvfp4", **ROTATED},
    "branch": {"weights": "int8-row", "lowrank": {"svd": {"rank": 8}}, **ROTATED},
}
EXACT = ("w8a8", "w4a8", "static", "rows", "e2m1")
CASES = [
    *((name, kind) for name in ("dit", "pixart", "flux") for kind in ("w8a8", "w4a8", "w4a16")),
    *(("wan", kind) for kind in ("w4a8", "w4a16")),
    ("sd3", "w4a8"),
    *(("dit", kind) for kind in list(KINDS)[3:]),
]
TIMES = (900.0, 100.0)
FEW = {"calibration": {"samples": 2, "batch_size": 2, "steps": 2, "num_timestep_bins": 2}}


@functools.cache
def quantized(name: str, kind: str) -> nn.Module:
    model = tiny.TRANSFORMERS[name]()
    return dtq.quantize(model, "rtn-w4a8", progress=False, **KINDS[kind], **FEW)


def outputs(model: nn.Module, name: str) -> list[torch.Tensor]:
    calls = [dummy_inputs(tiny.TRANSFORMERS[name](), 2, t, seed=1) for t in TIMES]
    with torch.no_grad():
        return [model(**call)[0] for call in calls]


def every_case(rank: int, world: int, folder: Path) -> None:
    """Save outputs of the whole and of the sharded model in ``folder``, for each case."""
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    results = {}
    for name, kind in CASES:
        whole = quantized(name, kind)
        cut = shard(copy.deepcopy(whole), rank, world)
        slices = sum(isinstance(m, Slice) for m in cut.modules())
        results[name, kind] = outputs(whole, name), outputs(cut, name), slices
    policy = StepPolicy((500.0,), ("a16", "native"))
    whole = copy.deepcopy(quantized("dit", "w8a8"))
    install_clock(whole, (), policy)
    cut = shard(copy.deepcopy(whole), rank, world)
    results["dit", "policy"] = outputs(whole, "dit"), outputs(cut, "dit"), 1
    for name in ("dit", "flux"):
        cut = load_sharded(folder / name, rank, world)
        want = outputs(quantized(name, "w4a8"), name)
        results[name, "loaded"] = want, outputs(cut, name), sum(p.nbytes for p in cut.parameters())
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
