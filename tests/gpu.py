# SPDX-License-Identifier: Apache-2.0
"""All checks that need a GPU, as two commands: is it right, then is it fast. ``make gpu``.

From a checkout, without installing dtq, without a network, on an image with torch from 2.10 (CUDA),
numpy and safetensors; nvcc compiles the kernels. Checks that need diffusers (T12, a compiled DiT)
are skipped by name where it is missing, and so is everything else that a machine cannot run.

    PYTHONPATH=. python3 tests/gpu.py checks --out .gpu
    PYTHONPATH=. python3 tests/gpu.py targets --out .gpu

``checks``: the library loads; single instructions give the bits of the emulator; the program
``cuda_ext/tests/test_gemm.cpp``; products of large tiles against float64 on the GPU, every kernel
named; ops against the torch reference on random sizes; kernels that are not the default yet; the
robustness list. ``targets``: whether the kernels that are not the default are faster, what the machine
reaches, T1 to T12. ``sanitizer``: compute-sanitizer, only where it is asked for.

Results are in ``OUT/checks.json`` and so on, with tables next to it (``.md``). Both files are
written anew at each result, so that a run may be killed at any moment. A check that takes too long
is stopped, and the checks after it run in a new process. An existing file is never replaced.
The exit status is 0 if nothing failed and every "must" is met.

``--fake`` runs the same on the CPU with small sizes, to test this script.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import gpu_checks
import gpu_options
import gpu_robust
import gpu_run
import gpu_targets
from gpu_run import Check, Results, Session

from dtq.bench.gpu_linears import conditions
from dtq.bench.timer import clock_of

COMMANDS: dict[str, Callable[[], list[Check]]] = {
    "checks": lambda: [*gpu_checks.checks(), *gpu_options.checks(), *gpu_robust.checks()],
    "targets": lambda: [*gpu_options.timing_checks(), *gpu_targets.checks()],
    "sanitizer": gpu_checks.sanitizer_checks,
}
"""The checks of each command."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; its commands are those that have a chosen check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", nargs="*", metavar="|".join(COMMANDS), help="checks and targets")
    parser.add_argument("--out", type=Path, default=Path(".gpu"), help="folder of the results")
    parser.add_argument("--parts", default="", help="only these parts, with commas")
    parser.add_argument("--only", default="", help="only checks whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fake", action="store_true", help="on the CPU, small: tests this script")
    parser.add_argument("--list", action="store_true", help="print the checks, run nothing")
    parser.add_argument("--continue", dest="file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    parts = {check.part for checks in COMMANDS.values() for check in checks()}
    options.parts = [part for part in options.parts.split(",") if part]
    for given, known in ((options.command, COMMANDS), (options.parts, parts)):
        if wrong := [name for name in given if name not in known]:
            parser.error(f"{', '.join(wrong)}: there are {', '.join(known)}")
    wanted = options.command or (COMMANDS if options.parts else ("checks", "targets"))
    options.command = [command for command in wanted if chosen(command, options)]
    if not options.command:
        parser.error(f"no check whose name contains {options.only!r}: see --list")
    return options


def chosen(command: str, options: argparse.Namespace) -> list[Check]:
    """The checks of a command that the options choose."""
    return [
        check
        for check in COMMANDS[command]()
        if (not options.parts or check.part in options.parts) and options.only in check.name
    ]


def child(command: str, path: Path, options: argparse.Namespace) -> list[str]:
    """The command line of the process that runs the checks of a command."""
    return [
        sys.executable,
        os.path.abspath(__file__),
        command,
        f"--continue={path}",
        f"--parts={','.join(options.parts)}",
        f"--only={options.only}",
        f"--rounds={options.rounds}",
        *(["--fake"] if options.fake else []),
    ]


def work(command: str, path: Path, options: argparse.Namespace) -> int:
    """Run the checks of a command in this process, and continue the results of ``path``."""
    device = torch.device("cpu" if options.fake else "cuda")
    results = Results(path)
    results.data["conditions"] = conditions(options.rounds, device)
    s = Session(device, clock_of(device), options.rounds, options.fake, results)
    return gpu_run.run_checks(chosen(command, options), s)


def main(arguments: list[str] | None = None) -> int:
    """Watch a child process for each command."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.list:
        print("\n".join(check.key for c in options.command for check in chosen(c, options)))
        return 0
    if options.file is not None:
        gpu_run.end_with_parent()
        return work(options.command[0], options.file, options)
    if not options.fake and not torch.cuda.is_available():
        print("no GPU that torch can use; --fake runs the script on the CPU", file=sys.stderr)
        return 2
    failed = 0
    for command in options.command:
        path = gpu_run.free_name(options.out, command)
        Results(path).save()
        failed += gpu_run.supervise(child(command, path, options), path)
        data = Results(path).data
        checked = sum(f["good"] is not None for f in data["findings"])
        skipped = sum(f["value"].startswith("skipped: ") for f in data["findings"])
        bad = sum(f["good"] is False for f in data["findings"])
        print(f"{command}: {bad} of {checked} failed, {skipped} skipped; {path.with_suffix('.md')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
