# SPDX-License-Identifier: Apache-2.0
"""The step clock: a tensor that tells layers the current timestep bin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dtq.plan.step_policy import StepPolicy


class StepClock(nn.Module):
    """The part of the trajectory that the model is in, shared by every layer.

    Tensors, not numbers: a compiled graph then serves every timestep. Not buffers: offloading to
    disk, or with a stream, would put back the value they had when it was switched on.

    Attributes:
        bin: int64 (1,), the bin of static activation scales, on the device of the timestep.
        mode: int64 (1,) on the CPU, index into ``modes``: host code branches on it, without
            waiting for a GPU more than once a step.
        modes: activation modes of the step policy, keys of ``acts.MODES``; empty without one.
    """

    def __init__(self, edges: Sequence[float], policy: StepPolicy | None = None) -> None:
        super().__init__()
        self.bin = torch.zeros(1, dtype=torch.int64)
        self.edges = torch.tensor(list(edges), dtype=torch.float64)
        self.modes = policy.precisions if policy is not None else ()
        self.mode = torch.zeros(1, dtype=torch.int64)
        self.mode_edges = torch.tensor(policy.edges if policy else (), dtype=torch.float64)

    def set(self, timestep: Tensor) -> None:
        """Move to where ``timestep`` is, a tensor of any shape; the first entry decides."""
        first = timestep.reshape(-1)[:1]
        self._follow(first.device)
        self.bin.copy_(torch.bucketize(first.to(self.edges), self.edges))
        if self.modes:
            self.mode.copy_(torch.bucketize(first.cpu().double(), self.mode_edges))

    def _follow(self, device: torch.device) -> None:
        if self.bin.device != device:
            with torch.inference_mode(False):  # else it could not be set outside of that mode
                self.bin, self.edges = self.bin.to(device), self.edges.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StepClock:
        # before the first call: a device that changes in it would compile a second graph
        self._follow(fn(self.bin).device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
