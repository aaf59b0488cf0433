# SPDX-License-Identifier: Apache-2.0
"""How long something takes: on the host by a clock, on a GPU by events around a captured graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

_ENOUGH = 2e-3  # seconds of a measurement: below, the clock's own time shows


class Clock(Protocol):
    """Makes a stopwatch of something that is done again and again."""

    @property
    def name(self) -> str:
        """What is measured, for the conditions."""

    def watch(self, run: Callable[[], object]) -> Callable[[], float]:
        """A function that runs it and returns the seconds of one run."""


class HostClock:
    """With one thread the clock is that of the thread, which stands still while others have the
    core; with several it is the wall's."""

    @property
    def name(self) -> str:
        return "thread" if torch.get_num_threads() == 1 else "wall"

    def watch(self, run: Callable[[], object]) -> Callable[[], float]:
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        run()  # does not count: memory is allocated, kernels are made
        started = clock()
        run()
        repeats = max(1, min(50, int(_ENOUGH / max(clock() - started, 1e-6))))

        def measure() -> float:
            started = clock()
            for _ in range(repeats):
                run()
            return (clock() - started) / repeats

        return measure


class GpuClock:
    """Runs are captured in one graph, so that the host's launches do not count."""

    name = "events around a replayed CUDA graph"

    def watch(self, run: Callable[[], object]) -> Callable[[], float]:
        once = self._alone(run)
        repeats = max(4, min(64, int(_ENOUGH / max(once, 1e-6))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def measure() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / repeats

        measure()
        return measure

    def _alone(self, run: Callable[[], object]) -> float:
        """Seconds of a run; warmed up on a stream of its own, as capturing wants it."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
            begin.record()
            run()
            end.record()
        torch.cuda.current_stream().wait_stream(stream)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock for work on a device."""
    return GpuClock() if device.type == "cuda" else HostClock()
