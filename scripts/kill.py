# SPDX-License-Identifier: Apache-2.0
"""Kill quantize runs at random moments, continue them, and compare their outputs.

    python scripts/kill.py demo --kills 50 --recipe w4a8 --samples 8 --steps 4
    python scripts/kill.py demo --kills 5 --processes 2 --recipe w4a8 --samples 8 --steps 4

First a run without a kill, in a folder of its own: every other run has to end with the same bytes.
Then runs into one folder, each killed by SIGKILL after a random share of the time of the first run,
and started again by the same command. Nothing that a killed run leaves next to the output may load
in diffusers. With ``--processes`` one random process of a ``torchrun`` is killed, and the others have
to end with an error before the timeout. Other options are those of ``dtq quantize``.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dtq.errors import LIBRARY_ERRORS, DtqError

TIMEOUT = 120.0  # seconds; by then the other processes have noticed


@dataclass
class Count:
    """The result of all kills.

    Attributes:
        kills: processes killed.
        stages: what the killed runs had on disk: nothing, tasks, a half-written output.
        finished: runs that ended by themselves, all with the bytes of the first.
        slowest: seconds until the other processes of a run with a killed one had ended.
    """

    kills: int = 0
    stages: dict[str, int] = field(default_factory=dict)
    finished: int = 0
    slowest: float = 0.0


def digest(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


IMPORTED = ["dtq.api", "dtq.checkpoint.writer", "dtq.cli.inputs", "dtq.estimate",
            "dtq.evaluate.evaluate", "dtq.runs.run_dir", "dtq.stages.run_identity"]  # fmt: skip
"""Modules that the commands import, loaded in advance."""


def forked(
    arguments: list[str],
    log: Path,
    environment: dict[str, str] | None = None,
    command: str = "quantize",
    first: Callable[[], object] = int,
) -> Any:
    """``dtq quantize`` in a process that has imported everything already, after ``first``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    args = ([command, *arguments], str(log), environment or {}, first)
    child = context.Process(target=_dtq, args=args)
    child.start()
    return child


def _dtq(
    arguments: list[str], log: str, environment: dict[str, str], first: Callable[[], object]
) -> None:
    from dtq.cli import main

    os.environ.update(environment)
    first()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(arguments)


class Run:
    """A started run: one process of the fork server, or a ``torchrun``."""

    def __init__(self, arguments: list[str], processes: int, log: Path) -> None:
        self.processes = processes
        if processes == 1:
            self.child = forked(arguments, log)
            return
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "dtq", "quantize", *arguments]
        with log.open("a") as file:
            self.torchrun = subprocess.Popen(command, stdout=file, stderr=file)

    def code(self, timeout: float) -> int | None:
        """The exit code, None while it runs."""
        if self.processes == 1:
            self.child.join(timeout)
            return self.child.exitcode
        try:
            return self.torchrun.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, rng: random.Random) -> None:
        """SIGKILL to the process, or to a random one of several."""
        if self.processes == 1:
            os.kill(self.child.pid, signal.SIGKILL)
            return
        workers = psutil.Process(self.torchrun.pid).children()
        if workers:
            os.kill(rng.choice(workers).pid, signal.SIGKILL)


def stage(out: Path) -> str:
    """What a killed run left on the disk; nothing of it may load."""
    for partial in out.parent.glob(f".{out.name}.*.partial"):
        check_does_not_load(partial)
        return "half-written output"
    work = out.with_name(f".{out.name}.work")
    if out.exists():
        return "output, tasks not yet removed" if work.exists() else "whole output"
    if list(work.rglob("promote/*")) or list(work.rglob("compare transforms/*")):
        return "tasks of the whole model"
    if list(work.rglob("quantize/*")):
        return "tasks of layers"
    return "tasks of the calibration" if list(work.rglob("statistics/*")) else "no task"


def check_does_not_load(folder: Path) -> None:
    """Fail if the folder loads, unless it is complete and only its rename was missing."""
    from diffusers import DiffusionPipeline

    if (folder / "dtq_report.json").exists():
        return
    try:
        DiffusionPipeline.from_pretrained(folder)
    except (DtqError, *LIBRARY_ERRORS):
        return
    raise SystemExit(f"{folder} is half-written, and loads")


def kill_and_continue(
    arguments: list[str], kills: int, *, processes: int = 1, seed: int = 0, folder: Path
) -> Count:
    """Kill runs of ``dtq quantize ARGUMENTS`` until ``kills`` are counted, then finish the last.

    Raises:
        SystemExit: an end with other bytes, something half-written that loads, a run that fails
            by itself, or processes that outlive a killed one.
    """
    rng, count, log = random.Random(seed), Count(), folder / "log"
    Run(["--help"], processes, log).code(3600)  # the fork server imports everything
    started = time.monotonic()
    first = Run([*arguments, "-o", str(folder / "first")], processes, log)
    if first.code(3600):
        raise SystemExit(f"the run without a kill failed:\n{log.read_text()[-2000:]}")
    whole = time.monotonic() - started
    want, out = digest(folder / "first"), folder / "out"
    while True:
        run = Run([*arguments, "-o", str(out)], processes, log)
        code = run.code(rng.uniform(0, whole) if count.kills < kills else 3600)
        if code is None:
            run.kill(rng)
            killed = time.monotonic()
            code = run.code(TIMEOUT)
            if code is None:
                raise SystemExit(f"{TIMEOUT:.0f} s after a kill the others still run")
            if code:  # else it was done before the kill reached it
                count.slowest = max(count.slowest, time.monotonic() - killed)
                count.kills += 1
                seen = stage(out)
                count.stages[seen] = count.stages.get(seen, 0) + 1
                if seen != "whole output":
                    continue
                code = 0  # nothing is left to do
        if code:
            raise SystemExit(f"a run failed:\n{log.read_text()[-2000:]}")
        if digest(out) != want:
            raise SystemExit(f"after {count.kills} kills: {out} has other bytes than the first run")
        if left := [p.name for p in folder.glob(".out*") if p.name != ".out.lock"]:
            raise SystemExit(f"left over: {left}")
        count.finished += 1
        if count.kills >= kills:
            return count
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: a temporary folder")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="dtq-kill-") as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        count = kill_and_continue(
            [options.model, *more], options.kills, processes=options.processes,
            seed=options.seed, folder=folder,
        )  # fmt: skip
    print(f"{count.kills} kills, {count.finished} runs continued to the end: the same bytes")
    print("killed with: " + ", ".join(f"{name} {n}" for name, n in sorted(count.stages.items())))
    print(f"others ended at most {count.slowest:.1f} s after a kill")


if __name__ == "__main__":
    main()
