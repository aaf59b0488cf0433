# SPDX-License-Identifier: Apache-2.0
"""Print a table for docs/large.md: estimated and measured peak memory of ``dtq quantize``.

    python scripts/quantizing_memory.py demo demo-text
    python scripts/quantizing_memory.py .big/flux-0.5b --recipe w4a16 -- --memory 1GB

Each model is planned (``dtq plan --json``) and quantized, with the same options, in a process of its
own. The measured peak is that of the kernel for that process (``ru_maxrss``); it includes mapped
pages of files. ``scripts/big.py`` builds large random models. Options after ``--`` are those of
both commands.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from big import run

from dtq import demo


def estimated(model: str, options: list[str]) -> int:
    """Bytes that ``dtq plan`` prints as the peak: the largest of all models of the run."""
    command = [sys.executable, "-m", "dtq", "plan", model, *options, "--json"]
    data = json.loads(subprocess.check_output(command))
    parts = [data] if "memory" in data else list(data.values())
    return max(part["memory"] for part in parts)


def measured(model: str, options: list[str]) -> int:
    """Peak of the resident memory of ``dtq quantize``, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out")
        return run("-m", "dtq", "quantize", model, *options, "-o", out).peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="folders or bundled names")
    parser.add_argument("--recipe", default="w4a8", help="default: w4a8")
    given = sys.argv[1:]
    own = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:own])
    options = ["--recipe", args.recipe, *given[own + 1 :]]
    print("| model | options | estimated | measured | estimated / measured |")
    print("| --- | --- | ---: | ---: | ---: |")
    for model in args.models:
        guess, peak = estimated(model, options), measured(model, options)
        shown = model if demo.path_of(model) != Path(model) else Path(model).name
        print(
            f"| {shown} | `{' '.join(options)}` | {guess / 1e9:.3f} GB | {peak / 1e9:.3f} GB "
            f"| {guess / peak:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
