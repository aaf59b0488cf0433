# SPDX-License-Identifier: Apache-2.0
"""Peak memory while sampling, for each way that diffusers offloads weights, before a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dtq.estimate.fake_pipeline import Activations, FakeRun
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import swap_empty
from dtq.pipelines import prompts
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings
from dtq.plan.layers import CheckpointSpec, Plan
from dtq.stages.float_model import float32_modules

GPU_SIZES = (8, 12, 16, 24, 32, 48, 80)
"""GPU memories in GB (1e9 bytes) that the estimates are compared with."""
GPU_CONTEXT = 1.0e9
"""Bytes of a GPU that are not for tensors: CUDA's context and kernels, and fragments of torch's
allocator. An assumption: no GPU was measured."""


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes of weights and activations at the peak, on the device that computes.

    Attributes:
        weights: of each model of the pipeline.
        activations: as a run without weights found them.
        modes: offload mode to the peak; see :func:`peaks`.
    """

    weights: dict[str, int]
    activations: Activations
    modes: dict[str, int]

    def fits(self, mode: str) -> tuple[int, ...]:
        """The sizes of ``GPU_SIZES`` that a mode fits in."""
        return tuple(s for s in GPU_SIZES if self.modes[mode] + GPU_CONTEXT <= s * 1e9)


def sampling_memory(
    pipeline: Any,
    settings: SamplingSettings,
    dtype: torch.dtype,
    plans: Mapping[str, Plan] | None = None,
) -> SamplingMemory:
    """Estimate the memory of sampling one batch.

    Args:
        pipeline: with models on the meta device, which are changed: linears of ``plans`` become
            quantized ones.
        settings: of the call; two steps are taken, as all are alike, and one batch.
        dtype: compute dtype.
        plans: of the models that are quantized, by component; others stay float.

    Raises:
        InputError: the pipeline rejects the call.
    """
    models = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}
    for name, model in models.items():
        plan = (plans or {}).get(name)
        cast_floats(model, dtype)
        if plan is not None:
            quantize_empty(model, plan, dtype)
    requests = prompts.load(settings.prompts, pipeline, settings.batch_size)
    with FakeRun(pipeline) as run:
        for _ in run_pipeline(pipeline, requests, settings):
            pass
    weights = {name: tensor_bytes(model) for name, model in models.items()}
    return SamplingMemory(weights, run.activations, peaks(models, run.activations))


def cast_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model on the meta device, except for modules that stay float32 in this dtype."""
    wide = float32_modules(model, dtype)
    cast: dict[int, nn.Parameter] = {}  # a tied weight stays one tensor
    for name, module in model.named_modules():
        kept = any(part in wide for part in name.split("."))
        for key, tensor in [*module._parameters.items()]:
            if tensor is not None and tensor.is_floating_point():
                chosen = torch.float32 if kept or key in wide else dtype
                made = nn.Parameter(tensor.detach().to(chosen), False)
                module._parameters[key] = cast.setdefault(id(tensor), made)


def quantize_empty(model: nn.Module, plan: Plan, dtype: torch.dtype) -> None:
    """Put the quantized linears of a plan into a model on the meta device."""
    edges = tuple(1000.0 * i / plan.bins for i in range(1, plan.bins))
    layers = {layer.name: layer.spec for layer in plan.quantized()}
    swap_empty(model, CheckpointSpec(layers, edges), dtype)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model, each tensor once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def peaks(models: Mapping[str, nn.Module], activations: Activations) -> dict[str, int]:
    """Peak bytes on the device by offload mode.

    ``none``: every weight stays. ``model``: one model at a time (``enable_model_cpu_offload``).
    ``group``: one block of a model and what lies outside of its blocks
    (``enable_group_offload(offload_type="block_level", num_blocks_per_group=1)``; with
    ``use_stream`` one block more). ``sequential``: one module without children
    (``enable_sequential_cpu_offload``).

    Args:
        models: of the pipeline by name.
        activations: of a run; a model that did not run needs no memory when it is offloaded.
    """
    ran = activations.components

    def largest(resident: Any) -> int:
        found = (resident(models[name]) + live for name, live in ran.items())
        return max(activations.total, *found) if ran else activations.total

    return {
        "none": sum(map(tensor_bytes, models.values())) + activations.total,
        "model": largest(tensor_bytes),
        "group": largest(_block_level),
        "sequential": largest(_largest_leaf),
    }


def _block_level(model: nn.Module) -> int:
    """Bytes of the largest block, and of the modules of the top level that are no block lists."""
    blocks, listed = [0], 0
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            sizes = [tensor_bytes(block) for block in child]
            blocks += sizes
            listed += sum(sizes)
    return tensor_bytes(model) - listed + max(blocks)


def _largest_leaf(model: nn.Module) -> int:
    sizes = [
        tensor_bytes(m)
        for m in model.modules()
        if isinstance(m, QuantLinear) or not any(True for _ in m.children())
    ]
    return max(sizes, default=0)
