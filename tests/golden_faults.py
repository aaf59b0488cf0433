# SPDX-License-Identifier: Apache-2.0
"""Plant faults in the asm statements of the golden kernels' PTX, and list those that change nothing.

    PYTHONPATH=. python tests/golden_faults.py 90a      # or 120f; a minute

Each fault exchanges two registers of one statement, or removes it, in one kernel of ``golden.cu``.
The kernels of all faults are translated (``cuda_ext/sim/translate.py``), compiled and run on the
emulator. A kernel that gives the right bits in spite of a fault does not see the operand; some
faults are none, such as exchanged factors.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import golden

sys.path.insert(0, str(golden.FOLDER / "sim"))

import translate

AT_ONCE = 60
"""Faults in one library."""

_PROGRAM = """
#include "{source}"
namespace dtq {{
void (*const kFaulty[])(Golden) = {{ {kernels} }};
}}
// Runs a faulty kernel as golden() runs the entry.
GOLDEN_EXPORT int faulty(int fault, int entry, const void* in, void* out) {{
  Entry e = kEntries[entry];
  e.kernel = kFaulty[fault];
  return run(e, in, out, nullptr);
}}
"""


class Fault(NamedTuple):
    """A kernel with a fault: its name, what was done to which statement, its code in C++."""

    kernel: str
    what: str
    statement: str
    code: str


def variants(statement: str) -> Iterator[tuple[str, str]]:
    """What is done, and the statement after it."""
    found = list(re.finditer(r"%(r|rd|rs|f|p)\d+", statement))
    for i, j in itertools.combinations(range(len(found)), 2):
        a, b = found[i], found[j]
        # of the many sums of a wgmma only neighbors
        if a.group() == b.group() or a.group(1) != b.group(1) or (len(found) > 20 and j > i + 1):
            continue
        middle = statement[a.end() : b.start()]
        exchanged = statement[: a.start()] + b.group() + middle + a.group() + statement[b.end() :]
        yield f"{a.group()} and {b.group()} exchanged", exchanged
    yield "removed", ""


def faults(ptx: str, names: set[str]) -> Iterator[Fault]:
    """The faults of the kernels of these names; a statement that a kernel repeats has them once."""
    seen, number = set(), itertools.count()
    for kernel, body in translate.kernels(ptx):
        name = kernel.name.removeprefix("golden_")
        for block in re.finditer(
            r"(// begin inline asm\n)(.*?)(?=\s*// end inline asm)", body, re.S
        ):
            text = block.group(2)
            plain = (name, re.sub(r"%[a-z]+\d+", "%", text))
            headers = text.lstrip().startswith("ld.global.nc.")  # of CUDA's
            if name not in names or plain in seen or headers:
                continue
            seen.add(plain)
            for what, changed in variants(text):
                twin = translate.Kernel(f"{kernel.name}_{next(number)}", kernel.symbols)
                try:
                    twin.translate(body[: block.start(2)] + changed + body[block.end(2) :])
                except SyntaxError:
                    continue  # the translator finds it
                yield Fault(name, what, " ".join(text.split()), twin.code())


def undetected(arch: str, work: Path) -> Iterator[Fault]:
    """The faults that leave the results as they are."""
    compiler = shutil.which("nvcc") or sys.exit("needs nvcc")
    right = golden.translated(work, compiler, arch)
    major = int(arch.rstrip("abcdef")) // 10
    names = {name for name, kernel in right.kernels.items() if kernel.major in (0, major)}
    all_faults = list(faults((work / "golden.ptx").read_text(), names))
    print(f"{len(all_faults)} faults", flush=True)
    for first in range(0, len(all_faults), AT_ONCE):
        some = all_faults[first : first + AT_ONCE]
        library = _library(work / f"faults-{first}", (work / "golden.h").read_text(), some)
        for number, fault in enumerate(some):
            if not any(
                _differs(library, right, number, fault.kernel, seed) for seed in golden.SEEDS
            ):
                yield fault


def _library(folder: Path, header: str, some: list[Fault]) -> ctypes.CDLL:
    folder.mkdir()
    (folder / "golden.h").write_text(header + "\n".join(fault.code for fault in some))
    kernels = ", ".join(re.findall(r"void (golden_\w+)", fault.code)[0] for fault in some)
    source = folder / "faults.cpp"
    source.write_text(_PROGRAM.format(source=golden.SOURCE, kernels=kernels))
    flags = [*golden.EMULATED, "-O0", f'-DDTQ_TRANSLATED="{folder / "golden.h"}"']
    subprocess.run(["g++", *flags, str(source), "-o", str(folder / "faults.so")], check=True)
    library = ctypes.CDLL(str(folder / "faults.so"))
    library.faulty.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    return library


def _differs(library: ctypes.CDLL, right: golden.Library, fault: int, name: str, seed: int) -> bool:
    kernel = right.kernels[name]
    given, out = kernel.operands(seed)
    library.golden_seed(ctypes.c_uint64(seed))
    status = library.faulty(fault, kernel.number, given.data_ptr(), out.data_ptr())
    return status != 0 or not out.equal(right.run(name, seed))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for left in undetected(sys.argv[1] if len(sys.argv) > 1 else "90a", Path(folder)):
            print(f"not detected: {left.kernel}: {left.what}: {left.statement[:100]}", flush=True)
