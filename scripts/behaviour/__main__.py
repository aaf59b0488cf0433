# SPDX-License-Identifier: Apache-2.0
"""Record what dtq computes, compare it later: did a change of the code change a number?

    python scripts/behaviour record before.json
    python scripts/behaviour compare before.json
    python scripts/behaviour compare before.json --only 'w4a8|gate'

The cases are checkpoints of many recipes, statistics, pictures, eval and gate, a tiny model of
every family, and runs that two processes shared or that were killed. dtq is run as users run it, by
its command line and by ``dtq.quantize``, never by its modules, so files may move. Options, keys and
formats may get other names, too: tables in ``session.py`` and ``digests.py`` hold the old and the
new one, and a record holds the new one. A number of a report that is found under another name is
listed as renamed, no more.

It takes about 12 minutes of one core. The bytes depend on the instructions of the CPU and on the
versions of libraries: compare on the machine that recorded. ``--package`` is the checkout to run,
with ``dtq/``, ``gate/`` and ``tests/``; by default the one that this folder is in.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cases import CASES
from session import Failed, Session

REPORTED = ("report", "eval", "gate")
"""First words of the entries that may have another name."""


def environment(session: Session) -> dict[str, str]:
    """What the bytes depend on.

    Raises:
        SystemExit: another dtq than that of the checkout would run.
    """
    out = session.folder / "environment.json"
    session.child("environment", out)
    found: dict[str, str] = json.loads(out.read_text())
    if (package := Path(found.pop("package"))) != session.package:
        raise SystemExit(f"dtq would come from {package}, not from {session.package}")
    return found


def run(session: Session, names: list[str]) -> dict[str, dict[str, str]]:
    """The entries of some cases; a case that fails has one, ``failed``."""
    found = {}
    for name in names:
        started = time.monotonic()
        try:
            found[name] = CASES[name](session)
        except Failed as error:
            found[name] = {"failed": str(error)}
        result = "failed" if "failed" in found[name] else f"{len(found[name])} entries"
        print(f"{name}: {result}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def differences(before: dict[str, str], after: dict[str, str]) -> tuple[list[str], list[str]]:
    """Lines that say what differs, and lines on numbers that are found under another name."""
    gone = {name: before[name] for name in before.keys() - after.keys()}
    new = {name: after[name] for name in after.keys() - before.keys()}
    lines, renamed = [], []
    for name in sorted(gone):
        same = [k for k in new if new[k] == gone[name]]
        if name.split()[0] in REPORTED and same:
            renamed.append(f"{name} is now {same[0]}")
            del gone[name], new[same[0]]
    lines += [f"gone: {name}" for name in sorted(gone)]
    lines += [f"new: {name}" for name in sorted(new)]
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            old, now = before[name].split("; "), after[name].split("; ")
            lines.append(name)
            lines += [f"  - {part}" for part in old if part not in now]
            lines += [f"  + {part}" for part in now if part not in old]
    return lines, renamed


def compare(recorded: dict[str, Any], session: Session, names: list[str], most: int) -> bool:
    """Run the cases and print what differs from the record; return whether nothing does."""
    for key, value in environment(session).items():
        if recorded["environment"].get(key) != value:
            print(f"warning: {key} was {recorded['environment'].get(key)}, is {value}")
    good = True
    for name in names:
        before = recorded["cases"].get(name, {})
        after = run(session, [name])[name]
        lines, renamed = differences(before, after)
        if "failed" in after:
            lines = [f"failed: {after['failed']}"]
        good = good and not lines
        for title, each in (("DIFFERS", lines), ("renamed", renamed)):
            if each:
                print(f"{title}: {name}", *each[:most], sep="\n  ")
                print(*[f"  and {len(each) - most} lines more"] * (len(each) > most), sep="\n")
    print(f"{len(names)} cases: {'the same' if good else 'DIFFERENT'}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python scripts/behaviour",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path, help="JSON, written or read")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases that a regex finds")
    parser.add_argument("--package", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--folder", type=Path, help="empty; what is made stays there")
    parser.add_argument("--most", type=int, default=40, help="lines that are shown for a case")
    options = parser.parse_args()
    names = [name for name in CASES if re.search(options.only, name)]
    if not names:
        parser.error(f"--only {options.only}: no such case; there are {', '.join(CASES)}")
    with tempfile.TemporaryDirectory(prefix="dtq-behaviour-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        session = Session(options.package.resolve(), folder)
        if options.action == "compare":
            recorded = json.loads(options.file.read_text())
            sys.exit(not compare(recorded, session, names, options.most))
        found: dict[str, Any] = {"environment": environment(session), "cases": {}}
        if options.only and options.file.exists():
            found["cases"] = json.loads(options.file.read_text())["cases"]
        found["cases"] |= run(session, names)
        options.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        failed = [name for name, entries in found["cases"].items() if "failed" in entries]
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
