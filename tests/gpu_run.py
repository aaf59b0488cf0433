# SPDX-License-Identifier: Apache-2.0
"""One run of ``tests/gpu.py``: its checks, the file of its results, the process that watches it.

The checks run in a child process, one after the other. The file is written anew, by renaming, when
a check starts, when it ends and at each value that it reports. The parent never uses the GPU: it
stops a check that takes too long, and starts another child after a check that hung, crashed or left
the GPU in an error, so that one wrong kernel does not cost the results of the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dtq.bench.compare import BenchRow
from dtq.bench.timer import Clock

GPU_LOST = 3
"""Exit status of a child that cannot use the GPU any more, although checks are left."""
_PAUSE = 0.2  # seconds between two looks at a child


class Skipped(Exception):
    """This machine cannot run the check; the message says what is missing."""


def need(package: str) -> None:
    """Skip the check where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"needs {package}")


@dataclass(frozen=True)
class Check:
    """One entry of the list.

    Attributes:
        part: of the report.
        name: as ``--only`` finds it.
        run: reports what it finds, by :meth:`Session.tell` or as its result, or raises.
        limit: seconds after which it is stopped.
    """

    part: str
    name: str
    run: Callable[[Session], object]
    limit: float = 60

    @property
    def key(self) -> str:
        """Part and name."""
        return f"{self.part}: {self.name}"


class Results:
    """The results so far, and their file: JSON, and next to it tables as Markdown.

    ``findings`` have part, what, value and good: True, False, or None for what is no check.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "complete": False, "conditions": {}, "running": None, "done": [], "findings": [], "rows": [],
        }  # fmt: skip
        if path.exists():
            self.data = json.loads(path.read_text())

    def save(self) -> None:
        """Write both files; whoever reads one sees the old or the new, never a part."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.path, json.dumps(self.data, indent=1) + "\n")
        _replace(self.path.with_suffix(".md"), tables(self.data))

    def start(self, check: Check | None) -> None:
        """Note the check that runs, for the parent and for whoever finds the file after a kill."""
        self.data["running"] = check and {
            "check": check.key, "part": check.part, "since": time.time(), "limit": check.limit
        }  # fmt: skip
        self.save()

    def tell(self, part: str, what: str, value: object, good: bool | None = None) -> None:
        """Add a finding, print it and write the file."""
        self.data["findings"].append(
            {"part": part, "what": what, "value": str(value), "good": good}
        )
        self.save()  # before it is printed: what was seen is in the file
        mark = {True: "ok  ", False: "FAIL", None: "    "}[good]
        print(f"{mark} {part}: {what}: {value}", flush=True)

    def end(self, check: str, following: Check | None = None) -> None:
        """Note that a check is done and, in the same write, which one runs next."""
        self.data["done"].append(check)
        self.start(following)

    @property
    def failed(self) -> int:
        """How many checks failed."""
        return sum(f["good"] is False for f in self.data["findings"])


def _replace(path: Path, text: str) -> None:
    # not dtq.io.atomic: it waits for the disk, hundreds of times; a kill needs no more than this
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    draft.write_text(text)
    draft.replace(path)


@dataclass
class Session:
    """The machine, and where results go.

    Attributes:
        small: whether this is a test of the script on a CPU.
    """

    device: torch.device
    clock: Clock
    rounds: int
    small: bool
    results: Results
    part: str = ""

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, of a Hopper without a GPU."""
        return torch.cuda.get_device_capability(self.device) if self.cuda else (9, 0)

    @property
    def multiprocessors(self) -> int:
        """Of the GPU; of an H200 without one."""
        if not self.cuda:
            return 132
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    def tell(self, what: str, value: object, good: bool | None = None) -> None:
        """Report a value, or a check if ``good`` is not None."""
        self.results.tell(self.part, what, value, good)

    def keep(self, rows: list[BenchRow]) -> list[BenchRow]:
        """Put timings into the report, and return them."""
        self.results.data["rows"] += [asdict(row) for row in rows]
        self.results.save()
        return rows

    def size(self, full: int, small: int) -> int:
        """The first on a GPU, the second in a test of the script."""
        return small if self.small else full

    def need_gpu(self) -> None:
        """Skip the check without a GPU."""
        if not self.cuda:
            raise Skipped("needs a GPU")

    @torch.no_grad()
    def seconds(self, run: Callable[[], object]) -> float:
        """Median time of a run."""
        watch = self.clock.watch(run)
        return statistics.median(watch() for _ in range(self.rounds))


def run_checks(checks: Sequence[Check], s: Session) -> int:
    """Run the checks that are not done yet, in this process.

    Returns:
        0, or ``GPU_LOST``.
    """
    left = [check for check in checks if check.key not in s.results.data["done"]]
    s.results.start(left[0] if left else None)
    for check, following in zip(left, [*left[1:], None], strict=True):
        s.part = check.part
        before = len(s.results.data["findings"])
        try:
            result = check.run(s)
            if result is not None or len(s.results.data["findings"]) == before:
                s.tell(check.name, "holds" if result is None else result, True)
        except Skipped as reason:
            s.tell(check.name, f"skipped: {reason}")
        except Exception as error:  # noqa: BLE001  (the checks after it shall run)
            traceback.print_exc()
            s.tell(check.name, f"{type(error).__name__}: {error}", False)
        if s.cuda and not _gpu_answers():
            s.tell(check.name, "the GPU is in an error state after it", False)
            s.results.end(check.key)
            return GPU_LOST
        s.results.end(check.key, following)
    s.results.data["complete"] = True
    s.results.save()
    return 0


def _gpu_answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


# ------------------------------------------------------------------------------------ the parent


def free_name(folder: Path, name: str) -> Path:
    """``name.json``, or ``name-2.json`` and so on: results of an earlier run are never replaced."""
    path, number = folder / f"{name}.json", 2
    while path.exists():
        path, number = folder / f"{name}-{number}.json", number + 1
    return path


def supervise(command: Sequence[str], path: Path) -> int:
    """Run the command until its checks are done; it continues the results of ``path``.

    Returns:
        The number of failed checks.
    """
    while True:
        done = len(Results(path).data["done"])
        # in a session of its own, so that what it starts can be stopped with it
        ended = _watch(subprocess.Popen(command, start_new_session=True), path)
        results = Results(path)
        if results.data["complete"]:
            return results.failed
        running = results.data["running"]
        if running is not None:
            results.tell(running["part"], running["check"].split(": ", 1)[1], ended, False)
            results.end(running["check"])
        elif len(results.data["done"]) == done:
            results.tell("run", "child process", f"{ended} before its first check", False)
            return results.failed


def _watch(child: subprocess.Popen[bytes], path: Path) -> str:
    """Wait for the child, and stop it when a check takes too long; how it ended."""
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = child.wait(_PAUSE)
                return f"ended with signal {-status}" if status < 0 else f"ended with {status}"
            running = Results(path).data["running"]
            if running is not None and time.time() - running["since"] > running["limit"]:
                return f"stopped after {running['limit']:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def end_with_parent() -> None:
    """Let the kernel of Linux kill this process when its parent is killed."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        if os.getppid() == 1:  # it was killed before
            os._exit(1)


# ------------------------------------------------------------------------------------ the report


def tables(data: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# GPU report", "", ", ".join(f"{k} {v}" for k, v in data["conditions"].items()), ""]
    if data["running"] is not None:
        lines += [f"Not finished: {data['running']['check']}", ""]
    for part in dict.fromkeys(f["part"] for f in data["findings"]):
        lines += [f"## {part}", "", "| | what | found |", "| --- | --- | --- |"]
        for f in data["findings"]:
            if f["part"] == part:
                mark = {True: "pass", False: "**FAIL**", None: ""}[f["good"]]
                lines.append(f"| {mark} | {f['what']} | {f['value']} |".replace("\n", " "))
        lines.append("")
    if data["rows"]:
        lines += [
            "## timings", "", "| case | M | who | us | over w8a8 | over w4a8 |",
            "| --- | ---: | --- | ---: | --- | --- |",
        ]  # fmt: skip
    for row in data["rows"]:
        over = [
            "{1:.2f} ({0:.2f}-{2:.2f})".format(*row["ratio"][n]) if n in row["ratio"] else ""
            for n in ("w8a8", "w4a8")
        ]
        micro = f"{row['seconds'] * 1e6:.1f}"
        cells = (row["case"], row["tokens"], row["name"], micro, *over)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
