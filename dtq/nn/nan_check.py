# SPDX-License-Identifier: Apache-2.0
"""``DTQ_DEBUG_NAN=1``: stop at the first module whose output is not finite, and name it.

A quantized layer rounds its input; NaN may leave it as a plausible number, so the first module is
what one wants to know, and a black picture does not tell it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import NonFiniteError
from dtq.models import TIME_ARGUMENTS
from dtq.nn.linear import QuantLinear

VARIABLE = "DTQ_DEBUG_NAN"
_MARK = "_dtq_alarm"


def requested() -> bool:
    """Whether the environment asks for the alarm."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def enable(model: nn.Module) -> None:
    """Watch every layer of a model; slow, for finding a fault. New layers are watched if again.

    The hooks raise :class:`NumberError` with the name of the module, the step of the sampling run,
    and whether its input was good.
    """
    steps = vars(model).get(_MARK)
    if steps is None:
        steps = vars(model)[_MARK] = StepTrace(model)
        model.register_forward_pre_hook(steps.enter, with_kwargs=True)
    for name, module in model.named_modules():
        leaf = isinstance(module, QuantLinear) or not any(True for _ in module.children())
        if leaf and module is not model and _MARK not in vars(module):
            vars(module)[_MARK] = True
            module.register_forward_hook(_listening(name, steps), with_kwargs=True)


class StepTrace:
    """Counts the steps of a sampling run from what the model is called with.

    Attributes:
        step: from 0; calls with one timestep are one step, a larger timestep begins a new run.
        timestep: of the last call, None for a model that is not told the time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.step = -1
        self.timestep: float | None = None
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of the model."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        found = next((given[n] for n in TIME_ARGUMENTS if given.get(n) is not None), None)
        now = None if found is None else float(torch.as_tensor(found).reshape(-1)[0])
        if now is None or self.timestep is None:
            self.step += 1
        elif now != self.timestep:
            self.step = 0 if now > self.timestep else self.step + 1
        self.timestep = now

    def __str__(self) -> str:
        at = "" if self.timestep is None else f" (timestep {self.timestep:g})"
        return f"step {max(self.step, 0)}{at}"


def broken(value: Any) -> int:
    """Entries that are NaN or infinite in the tensors of nested tuples, lists and mappings."""
    return sum(int((~t.isfinite()).sum()) for t in _floats(value))


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floats(item)


def _listening(name: str, steps: StepTrace) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        bad = broken(output)
        if not bad:
            return
        before = broken((args, kwargs))
        why = (
            f"{before} entries of its input are, too: what runs between the layers before it made "
            f"them"
            if before
            else "its input is finite"
        )
        raise NonFiniteError(
            f"{name} ({type(module).__name__}): {bad} entries of its output at {steps} are NaN or "
            f"infinite; {why}"
        )

    return hook
