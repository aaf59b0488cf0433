# SPDX-License-Identifier: Apache-2.0
"""The timestep that a model is called with: the argument's name, its value, edges of bins."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


def timestep_argument(model: nn.Module) -> str | None:
    """Name of the forward argument that carries the timestep, None when there is none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in TIME_ARGUMENTS if name in parameters), None)


def timestep_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The timestep of a call, the first of the batch; 0 where the model takes none."""
    name = timestep_argument(model)
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    now = bound.get(name) if name else None
    return float(torch.as_tensor(now).reshape(-1)[0]) if now is not None else 0.0


def timestep_edges(top: float, value: float, bins: int) -> list[float]:
    """Boundaries of equal bins of the timestep.

    Args:
        top: largest timestep, 0 for a class without a family.
        value: the timestep of the first call, which is the noisiest: up to 1000, or up to 1.
        bins: how many.
    """
    top = top or (1000.0 if value > 1.5 else 1.0)
    return [top * i / bins for i in range(1, bins)]


TIME_ARGUMENTS = ("timestep", "timesteps", "t", "vision_timesteps")
"""What diffusers' transformers call the timestep."""
