# SPDX-License-Identifier: Apache-2.0
"""The step clock: tensors that hold the current timestep bin, shared by the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.models.timestep import sample_timesteps
from dtq.plan.step_policy import StepPolicy

_DIFFERENT = "dtq: a compiled graph takes samples of one timestep; call it for each timestep"


class StepClock(nn.Module):
    """The current timestep bin and precision, shared by every quantized layer.

    They are tensors, so that one compiled graph serves every timestep. They are not buffers:
    offloading to disk, or with a stream, would reset them to their values at the time that it was
    enabled.

    Args:
        edges: inner edges of the timestep bins of static activation scales, rising.
        policy: the step policy; None: all steps have the precision of the format.

    Attributes:
        bin: int64 (1,), bin of the static activation scales, on the device of the timestep.
        mode: int64 (1,) on the CPU, an index into ``modes``. Host code branches on it, and needs to
            wait for a GPU only once per step.
        modes: precisions of the step policy; empty without a policy.
        samples: (B,) timesteps of the samples of the call; None where they are the same.
    """

    def __init__(self, edges: Sequence[float], policy: StepPolicy | None = None) -> None:
        super().__init__()
        self.samples: Tensor | None = None
        self.edges = torch.tensor(list(edges), dtype=torch.float64)
        self.modes = policy.precisions if policy is not None else ()
        self.mode_edges = torch.tensor(policy.edges if policy else (), dtype=torch.float64)
        with torch.inference_mode(False):  # an inference tensor could not be set outside of it
            self.bin = torch.zeros(1, dtype=torch.int64)
            self.mode = torch.zeros(1, dtype=torch.int64)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of copies and pickles
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        with torch.inference_mode(False):
            self.bin, self.mode = self.bin.clone(), self.mode.clone()

    def set(self, timestep: Tensor) -> None:
        """Set the clock to the timestep of a call: that of the noisiest tokens of each sample.

        Args:
            timestep: a scalar, (B,), or (B, ...) with one entry per token or frame.

        Raises:
            RuntimeError: in a compiled graph, for samples of different timesteps.
        """
        samples = sample_timesteps(timestep)
        self.samples = None
        if len(samples) > 1:
            alike = (samples == samples[0]).all()
            if torch.compiler.is_compiling():
                torch._assert_async(alike, _DIFFERENT)  # type: ignore[no-untyped-call]
            elif not alike:
                self.samples = samples
        self._set(samples[:1])

    def _set(self, timestep: Tensor) -> None:
        self._move_to(timestep.device)
        self.bin.copy_(torch.bucketize(timestep.to(self.edges), self.edges))
        if self.modes:
            self.mode.copy_(torch.bucketize(timestep.cpu().double(), self.mode_edges))

    def each_sample(self, rows: Tensor) -> Iterator[Tensor]:
        """The rows (M, K) of one sample after another, with the clock at its timestep.

        Raises:
            InputError: the rows of the samples cannot be told apart.
        """
        samples = self.samples
        assert samples is not None
        if len(rows) % len(samples):
            raise InputError(
                f"{len(samples)} samples of different timesteps in one call, and {len(rows)} rows: "
                f"call the model with the samples of one timestep at a time"
            )
        self.samples = None
        try:
            for i, part in enumerate(rows.chunk(len(samples))):
                self._set(samples[i : i + 1])
                yield part
        finally:
            self._set(samples[:1])
            self.samples = samples

    def _move_to(self, device: torch.device) -> None:
        if self.bin.device != device:
            with torch.inference_mode(False):
                self.bin, self.edges = self.bin.to(device), self.edges.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StepClock:
        # move with the model: a device that changes in the first call would compile a second graph
        self._move_to(fn(self.bin).device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
