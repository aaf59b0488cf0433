# SPDX-License-Identifier: Apache-2.0
"""The part of ``dtq plan`` about memory while sampling: estimated peaks, and GPUs that fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtq.cli.output import size, table
from dtq.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

    from dtq.plan import Plan
    from dtq.recipe import Recipe

MODES = {
    "none": "no offloading",
    "model": "enable_model_cpu_offload",
    "group": "enable_group_offload, block level",
    "sequential": "enable_sequential_cpu_offload",
}


def without_weights(folder: Path) -> tuple[Any, str]:
    """The pipeline of a folder with models on the meta device; or None, and why there is none."""
    from dtq.estimate.fake_pipeline import meta_pipeline

    try:
        return meta_pipeline(folder), ""
    except (InputError, CheckpointError) as error:
        return None, str(error)


def estimated(
    pipeline: Any, recipe: Recipe, batch: int, dtype: torch.dtype, plans: Mapping[str, Plan]
) -> dict[str, Any]:
    """Estimated peak bytes while sampling, by offload mode.

    Args:
        pipeline: of :func:`without_weights`; its models are changed.
        recipe: its calibration gives guidance and the arguments of the call.
        batch: images sampled at a time.
        dtype: compute dtype.
        plans: of the models that are quantized, by component.

    Returns:
        Of the JSON output: ``modes``, ``fits`` (GB), ``weights``, ``activations``, ``batch``; or
        ``unknown``, the reason why the pipeline does not run without weights.
    """
    from dtq.estimate.sampling import sampling_memory

    settings = replace(recipe.calibration, batch_size=batch, samples=batch, steps=2)
    try:
        found = sampling_memory(pipeline, settings, dtype, plans)
    except InputError as error:
        return {"unknown": str(error)}
    return {
        "batch": batch,
        "modes": found.modes,
        "fits": {mode: list(found.fits(mode)) for mode in found.modes},
        "weights": found.weights,
        "activations": found.activations.components,
    }


def show(found: dict[str, Any]) -> None:
    """Print what :func:`estimated` returns."""
    click.echo()
    if "unknown" in found:
        click.echo(f"memory while sampling: unknown. {found['unknown']}")
        return
    rows = [
        (MODES[mode], size(peak), ", ".join(f"{gb} GB" for gb in found["fits"][mode]) or "none")
        for mode, peak in found["modes"].items()
    ]
    table((f"memory while sampling, batch {found['batch']}", "peak", "GPUs that fit"), rows)
    live = ", ".join(f"{name} {size(n)}" for name, n in found["activations"].items())
    click.echo(f"estimated; activations while each model runs: {live}")
