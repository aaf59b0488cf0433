# SPDX-License-Identifier: Apache-2.0
"""What compiling the CPU's library and the GPU's has in common. No torch."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from dtq.io import checksum

ABI = (2, 10)
"""The torch whose stable ABI is used; any later one loads the libraries."""


def target() -> str:
    """The version that torch's headers are told to stay compatible with."""
    return f"0x{ABI[0]:02x}{ABI[1]:02x}000000000000ULL"


def digest(files: Iterable[Path], *rest: object) -> str:
    """A name for what a library is made of."""
    contents = (path.name.encode() + path.read_bytes() for path in sorted(files))
    return checksum.digest([" ".join(map(str, rest)).encode(), *contents])[:16]


def run(command: Sequence[str], who: str) -> None:
    """Run a compiler.

    Raises:
        OSError: it failed; its first error is in the message.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(first_error(who, done.stderr + done.stdout))


def first_error(who: str, said: str) -> str:
    """What a compiler's output comes to, in a line."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error:|fatal|\bld: ", line)] or lines
    return f"{who} failed: {errors[0].strip() if errors else 'no output'}"
