# SPDX-License-Identifier: Apache-2.0
"""Scan a transformer by tracing one forward, and make the random inputs of that forward."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn

from dtq.errors import InputError
from dtq.models import Scan, find_family, scan, scan_names

log = logging.getLogger("dtq")


def scan_model(model: nn.Module, run: Callable[[nn.Module], object] | None = None) -> Scan:
    """Scan a model by tracing a forward; by names alone if no forward can be run.

    On the meta device a forward that reads values of its tensors cannot run, for example to sort
    tokens by expert or to truncate captions.

    Args:
        model: the transformer.
        run: calls the model; None calls it with random inputs, if it has a family.
    """
    family = find_family(model)
    if run is None and family is None:
        return scan_names(model, None)
    try:
        return scan(model, family, run or _call_once)
    except (RuntimeError, ValueError) as error:
        if next(model.parameters()).device.type != "meta":
            raise
        reason = str(error).partition("\n")[0]
        why = f"roles come from layer names alone, its forward needs weights ({reason})"
        log.warning("%s: %s", type(model).__name__, why)
        return scan_names(model, family)


def dummy_inputs(model: nn.Module, batch: int, timestep: float, seed: int) -> dict[str, Any]:
    """Random arguments of one forward, on the device and in the dtype of the model.

    Args:
        model: the transformer; its class must have a family.
        batch: number of images.
        timestep: of all images, in the units of the model's timestep argument.
        seed: of the random values.

    Returns:
        Keyword arguments of the forward.

    Raises:
        InputError: dtq has no family for the class.
    """
    family = find_family(model)
    if family is None:
        raise InputError(
            f"{type(model).__name__}: dtq has no random inputs for this class; give it in its "
            f"pipeline, or pass inputs=[...], a list of keyword arguments of its forward"
        )
    rng = torch.Generator().manual_seed(seed)
    arguments = family.inputs(model.config, batch, torch.full((batch,), timestep), rng)
    # model.dtype ignores parameters that stay in float32, such as the first one of Wan
    device, dtype = model.device, model.dtype
    return recursively_apply(
        lambda t: t.to(device, dtype if t.is_floating_point() else None), arguments
    )


def _call_once(model: nn.Module) -> None:
    family = find_family(model)
    assert family is not None
    model(**dummy_inputs(model, 2, 0.5 * family.largest_timestep, 0))
