# SPDX-License-Identifier: Apache-2.0
"""Plants faults in the kernels, one at a time, and checks that the emulator's tests notice.

    python cuda_ext/sim/mutate.py [--jobs N] [--only WORD] [--short] [--list]

The faults are those of the tables next to this file. They are planted in copies of the sources. The
exit status is 1 if a fault survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent
COMMON = SOURCES.parent / "common_ext"  # included as ../common_ext
FLAGS = ("-std=c++20", "-ffp-contract=off", "-DDTQ_SIM", "-DDTQ_FIRST_FAILURE", "-w")
SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``file``; the tables of faults explain the other fields."""

    name: str
    file: str
    old: str
    new: str
    program: str
    flags: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    asan: bool = False
    short: bool = False


def faults() -> list[Fault]:
    """The faults of every table ``faults_X.toml``, whose program is ``tests/test_X.cpp``."""
    planted = []
    for path in sorted(Path(__file__).parent.glob("faults_*.toml")):
        program = path.stem.replace("faults", "test") + ".cpp"
        entries = tomllib.loads(path.read_text())["fault"]
        planted += [Fault(program=program, **entry) for entry in entries]
    return planted


def survives(fault: Fault, work: Path) -> str:
    """Plant the fault in a copy of the sources and run the tests.

    Args:
        fault: what is changed, and the test program.
        work: folder for the copy.

    Returns:
        Why the fault was not noticed; empty if it was.
    """
    parent = work / fault.name.replace(" ", "-")
    folder = parent / SOURCES.name
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(COMMON, parent / COMMON.name)
    path = folder / fault.file
    text = path.read_text()
    if fault.old not in text:
        return f"{fault.file} does not contain the text: {fault.old}"
    path.write_text(text.replace(fault.old, fault.new))
    program = folder / "program"
    sanitize = SANITIZE if fault.asan else ()
    source = str(folder / "tests" / fault.program)
    command = ["g++", "-O1", *FLAGS, *sanitize, *fault.flags, source, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        return f"does not compile: {built.stderr.strip()[:300]}"
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    try:
        done = subprocess.run(
            [str(program), *fault.arguments],
            capture_output=True,
            timeout=300,
            env=os.environ | options,
        )
    except subprocess.TimeoutExpired:
        return ""  # it hangs: noticed
    finally:
        shutil.rmtree(parent)
    return "" if done.returncode else "the tests passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--short", action="store_true", help="only those of the test suite")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [f for f in faults() if options.only in f.name and f.short >= options.short]
    if options.list:
        print("\n".join(f"{f.name}  ({f.file})" for f in chosen))
        return 0
    survived = 0
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(options.jobs) as pool:
        for fault, why in zip(
            chosen, pool.map(lambda f: survives(f, Path(work)), chosen), strict=True
        ):
            print(f"{'SURVIVED' if why else 'noticed '} {fault.name}  {why}", flush=True)
            survived += bool(why)
    print(f"{len(chosen) - survived} of {len(chosen)} faults noticed")
    return 1 if survived or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
