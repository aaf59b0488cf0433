# SPDX-License-Identifier: Apache-2.0
"""Stopwatches: a clock on the host, events around a captured graph on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_MIN_SECONDS = 2e-3  # of a measurement: in a shorter one the clock's own time shows


class HostClock:
    """CPU time of the process if there is one thread, else wall time.

    CPU time stands still while other processes have the core. It counts all threads of the process,
    because some libraries compute in a thread of their own.
    """

    @property
    def name(self) -> str:
        """``CPU time of the process`` or ``wall``."""
        return "CPU time of the process" if torch.get_num_threads() == 1 else "wall"

    def watch(self, run: Callable[[], object]) -> Callable[[], float]:
        """A stopwatch of ``run``, which is repeated in a measurement if it is short."""
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        run()  # does not count: it allocates memory and compiles kernels
        started = clock()
        run()
        repeats = max(1, min(50, int(_MIN_SECONDS / max(clock() - started, 1e-6))))

        def measure() -> float:
            started = clock()
            for _ in range(repeats):
                run()
            return (clock() - started) / repeats

        return measure


class GpuClock:
    """Runs are captured in one graph, so the launches of the host do not count."""

    name = "events around a replayed CUDA graph"

    def watch(self, run: Callable[[], object]) -> Callable[[], float]:
        """A stopwatch of ``run``, captured several times in one graph."""
        # warm-up is on a stream of its own, as capturing requires
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
            once = self._seconds(run)
        torch.cuda.current_stream().wait_stream(stream)
        repeats = max(4, min(64, int(_MIN_SECONDS / max(once, 1e-6))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                run()
        self._seconds(graph.replay)  # does not count
        return lambda: self._seconds(graph.replay) / repeats

    def _seconds(self, work: Callable[[], object]) -> float:
        """Seconds between events around the work, on the current stream."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


Clock = HostClock | GpuClock
"""Makes stopwatches: functions that run the work, and return the seconds of one run."""


def clock_of(device: torch.device) -> Clock:
    """The clock for work on a device."""
    return GpuClock() if device.type == "cuda" else HostClock()
