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

_DIFFERENT = "dtq: a graph takes samples of one timestep; call it for each timestep"


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
        samples: bins (B,), and modes (B,) if there are any, of the samples of the call; None where
            their timesteps are the same.
        token_layers: names of layers whose rows are tokens, also where there are as many as
            samples: a few tokens of one expert, for example.
    """

    def __init__(self, edges: Sequence[float], policy: StepPolicy | None = None) -> None:
        super().__init__()
        self.samples: tuple[Tensor, Tensor | None] | None = None
        self.token_layers: frozenset[str] = frozenset()
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
            RuntimeError: samples of different timesteps, in a compiled graph that contains this
                call, or while a CUDA graph is captured. On a GPU it is a device assertion, after
                which the process can no longer use the GPU.
        """
        samples = sample_timesteps(timestep)
        self._move_to(samples.device)
        bins = torch.bucketize(samples.to(self.edges), self.edges)
        modes = None
        if self.modes:
            modes = torch.bucketize(samples.cpu().double(), self.mode_edges)
        # a tensor that was expanded needs no comparison, which would wait for a GPU
        expanded = len(samples) == 1 or timestep.stride(0) == 0
        self.samples = None if expanded or _are_same(samples) else (bins, modes)
        self._select(0, bins, modes)

    def _select(self, sample: int, bins: Tensor, modes: Tensor | None) -> None:
        self.bin.copy_(bins[sample : sample + 1])
        if modes is not None:
            self.mode.copy_(modes[sample : sample + 1])

    def each_sample(self, x: Tensor, layer: str) -> Iterator[Tensor]:
        """The part of one sample after another, with the clock at its timestep.

        Args:
            x: input of a layer, (B, K) where it reads one row per sample, or (B, ..., K) with the
                parts of a sample, such as its frames, one after the other in the first axis.
            layer: its name.

        Raises:
            InputError: the first axis of ``x`` is not that of the samples.
        """
        assert self.samples is not None
        samples, count = self.samples, len(self.samples[0])
        tokens = x.ndim < 3 and (len(x) != count or layer in self.token_layers)
        if tokens or len(x) % count:
            raise InputError(
                f"{layer or 'a layer'} has an input of shape {list(x.shape)}, which does not show "
                f"the tokens of each of {count} samples of different timesteps: call the model "
                f"with the samples of one timestep at a time"
            )
        self.samples = None
        try:
            for i, part in enumerate(x.chunk(count)):
                self._select(i, *samples)
                yield part
        finally:
            self._select(0, *samples)
            self.samples = samples

    def _move_to(self, device: torch.device) -> None:
        if self.bin.device != device:
            with torch.inference_mode(False):
                self.bin, self.edges = self.bin.to(device), self.edges.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StepClock:
        # move with the model: a device that changes in the first call would compile a second graph
        self._move_to(fn(self.bin).device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _are_same(samples: Tensor) -> bool:
    """Whether all timesteps are the same; in a graph they have to be."""
    same = (samples == samples[0]).all()
    if in_graph(samples):
        torch._assert_async(same, _DIFFERENT)  # type: ignore[no-untyped-call]
        return True
    return bool(same)


def in_graph(x: Tensor) -> bool:
    """Whether a graph is compiled or captured, so that no value of ``x`` can be read now."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
