# SPDX-License-Identifier: Apache-2.0
"""The timestep of a call: name of the argument, its value, edges of timestep bins."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

TIME_ARGUMENTS = ("timestep", "timesteps", "t", "vision_timesteps")
"""Names of the timestep argument in the transformers of diffusers."""


def sample_timesteps(timestep: Tensor) -> Tensor:
    """The timestep of each sample of a batch, (B,): that of its noisiest tokens.

    Models with a timestep per token or frame give 0 to those that are not denoised, such as the
    first frame of image to video.

    Args:
        timestep: a scalar, (B,), or (B, ...) with one entry per token or frame.
    """
    return timestep.reshape(len(timestep) if timestep.ndim else 1, -1).amax(1)


def timestep_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The timestep of a call, of the first image in the batch; 0 if the model takes none."""
    signature = inspect.signature(model.forward)
    name = next((name for name in TIME_ARGUMENTS if name in signature.parameters), "")
    timestep = signature.bind_partial(*args, **kwargs).arguments.get(name)
    return float(sample_timesteps(torch.as_tensor(timestep))[0]) if timestep is not None else 0.0


def timestep_edges(top: float, value: float, bins: int) -> list[float]:
    """Edges of timestep bins of equal width.

    Args:
        top: largest timestep of the model's family; 0 without a family.
        value: timestep of the first, noisiest call. Without a family it decides whether timesteps
            go up to 1000 or up to 1.
        bins: number of bins.

    Returns:
        The ``bins - 1`` inner edges, rising.
    """
    top = top or (1000.0 if value > 1.5 else 1.0)
    return [top * i / bins for i in range(1, bins)]
