# SPDX-License-Identifier: Apache-2.0
"""``DTQ_DEBUG_NAN=1``: stop at the first module whose output is not finite, and name it.

A quantized layer rounds its input, so NaN can become a plausible number. Only the first module with
such an output shows the cause; a black image does not.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from dtq.errors import NonFiniteError
from dtq.models.timestep import sample_timesteps, timestep_argument
from dtq.nn.linear import QuantLinear

VARIABLE = "DTQ_DEBUG_NAN"
_MARK = "_dtq_nan_check"


def requested() -> bool:
    """Whether the environment variable ``DTQ_DEBUG_NAN`` is set."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def enable(model: nn.Module) -> None:
    """Check the output of every layer of a model; slow, for debugging.

    The hooks raise :class:`NonFiniteError` with the name of the module, the step of the sampling
    run, and whether the input was finite. A later call adds the hooks to layers that are new.
    """
    steps = vars(model).get(_MARK)
    if steps is None:
        steps = vars(model)[_MARK] = StepTrace()
        model.register_forward_pre_hook(steps.enter, with_kwargs=True)
    for name, module in model.named_modules():
        leaf = isinstance(module, QuantLinear) or not any(True for _ in module.children())
        if leaf and module is not model and _MARK not in vars(module):
            vars(module)[_MARK] = True
            module.register_forward_hook(partial(_check, name, steps), with_kwargs=True)


class StepTrace:
    """Counts the steps of a sampling run from the timesteps of the calls.

    Consecutive calls with the same timestep are one step; a larger timestep starts a new run.

    Attributes:
        step: index of the step, -1 before the first call.
        timestep: of the last call; None if the model takes none.
    """

    def __init__(self) -> None:
        self.step = -1
        self.timestep: float | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a call; a forward pre-hook of the model."""
        value = timestep_argument(module, args, kwargs)
        timestep = None if value is None else float(sample_timesteps(torch.as_tensor(value))[0])
        if timestep is None or self.timestep is None:
            self.step += 1
        elif timestep != self.timestep:
            self.step = 0 if timestep > self.timestep else self.step + 1
        self.timestep = timestep

    def __str__(self) -> str:
        at = "" if self.timestep is None else f" (timestep {self.timestep:g})"
        return f"step {max(self.step, 0)}{at}"


def count_nonfinite(value: Any) -> int:
    """Number of NaN or infinite entries in the tensors of nested tuples, lists and mappings."""
    floats = (t for t in tree_iter(value) if isinstance(t, Tensor) and t.is_floating_point())
    return sum(int((~t.isfinite()).sum()) for t in floats)


def _check(
    name: str, steps: StepTrace, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    outputs, cause = count_nonfinite(output), "its input is finite"
    if not outputs:
        return
    if inputs := count_nonfinite((args, kwargs)):
        cause = (
            f"{inputs} entries of its input are, too: they come from an op between this layer and "
            f"the layers before it"
        )
    raise NonFiniteError(
        f"{name} ({type(module).__name__}): {outputs} entries of its output at {steps} are NaN "
        f"or infinite; {cause}"
    )
