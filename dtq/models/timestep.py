# SPDX-License-Identifier: Apache-2.0
"""The timestep of a call: name of the argument, its value, edges of timestep bins."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import InputError

TIME_ARGUMENTS = (
    "timestep",
    "timesteps",
    "t",
    "vision_timesteps",
    "timestep_ratio",
    "time",
    "times",
)
"""Names of the timestep argument in models of diffusers and of other libraries."""


def sample_timesteps(timestep: Tensor) -> Tensor:
    """The timestep of each sample of a batch, (B,): that of its noisiest tokens.

    Models with a timestep per token or frame give 0 to those that are not denoised, such as the
    first frame of image to video.

    Args:
        timestep: a scalar, (B,), or (B, ...) with one entry per token or frame.
    """
    return timestep.reshape(len(timestep) if timestep.ndim else 1, -1).amax(1)


def timestep_argument(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The timestep that a call passes, usually a tensor; None if it passes none."""
    for name in TIME_ARGUMENTS:
        if kwargs.get(name) is not None:
            return kwargs[name]
    # of the class: hooks and adapters replace the forward of a model
    names = [*inspect.signature(type(model).forward).parameters][1:] if args else []
    given = zip(names, args, strict=False)
    return next((value for name, value in given if name in TIME_ARGUMENTS), None)


def timestep_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The timestep of a call whose samples have the same one; 0 if the model takes none.

    Raises:
        InputError: the samples have different timesteps.
    """
    timestep = timestep_argument(model, args, kwargs)
    if timestep is None:
        return 0.0
    samples = sample_timesteps(torch.as_tensor(timestep))
    if (samples != samples[0]).any():
        raise InputError(
            f"samples of different timesteps in one call ({samples[0]:g} is the first): calibrate "
            f"on calls whose samples have the same timestep"
        )
    return float(samples[0])


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
