# SPDX-License-Identifier: Apache-2.0
"""Plants faults in the kernels, one at a time, and asks whether the emulator's tests notice.

    python cuda_ext/sim/mutate.py [--jobs N] [--only WORD] [--list]

A fault is a text in a file and what takes its place. Those that only touch memory they should not
are run under address sanitizer. Leaves nothing behind; exit status 1 if a fault survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent
FLAGS = ("-std=c++20", "-ffp-contract=off", "-DDTQ_SIM", "-w")
SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
INT8, TWO_LEVEL, TABLE = "0", "1", "2"


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``file``; the cases of ``arch`` must notice.

    ``weights`` is the kind of weight to compile; ``asan`` needs address sanitizer to be seen.
    """

    name: str
    file: str
    old: str
    new: str
    arch: str
    weights: str = TWO_LEVEL
    asan: bool = False
    program: str = "test_gemm.cpp"


MMA, EPILOGUE, WEIGHTS, WGMMA = "gemm_mma.cuh", "epilogue.cuh", "levels.cuh", "gemm_wgmma.cuh"
FULL = "mbarrier_wait(ring.full(slot.stage), slot.round & 1);"
EMPTY = "if (slot.round) mbarrier_wait(ring.empty(slot.stage), (slot.round - 1) & 1);"
ISSUE = "wgmma_s8<256>(sums, now[k], x + uint64_t(2 * k), s || k);"

FAULTS = (
    Fault("no barrier in the loop", MMA, "sync_threads();  // the stage", "// the stage", "80"),
    Fault("wait one group too few", MMA, "wait<T::kStages - 2>", "wait<T::kStages - 1>", "80"),
    Fault("no wait", MMA, "    cp_async_wait<T::kStages - 2>();\n", "", "80"),
    Fault(
        "fill the stage that is read",
        MMA,
        "ahead % T::kStages * T::kStage, first",
        "s % T::kStages * T::kStage, first",
        "80",
    ),
    Fault(
        "no commit at the end",
        MMA,
        "    else cp_async_commit();\n    DTQ",
        "    DTQ",
        "80",
    ),
    Fault("only half a warp multiplies", MMA, "    uint32_t w[4];\n", "    uint32_t w[4];\n    if (lane() > 15) continue;\n", "80"),
    Fault("rows of x not guarded", MMA, "row + c * kPitch < all && ", "", "80", INT8, True),
    Fault("end of K not guarded", MMA, "? valid : 0;", "? 16 : 0;", "80", INT8, True),
    Fault("rows of the output not guarded", MMA, "if (m >= g.tokens) continue;", "", "80", INT8, True),
    Fault("columns of the output not guarded", MMA, "if (n >= g.rows) continue;", "", "80", INT8, True),
    Fault("wrong group", MMA, "const int group = (step * kStep + lane() % 4 * 16)", "const int group = (step * kStep)", "80"),
    Fault("columns of two registers exchanged", MMA, "x[i][0][2] = top.y", "x[i][0][2] = top.z", "80", INT8),
    Fault("sign bit not flipped", WEIGHTS, "word & 0x0F0F0F0Fu) * s.scale2 + s.b) ^ 0x80808080u", "word & 0x0F0F0F0Fu) * s.scale2 + s.b)", "80"),
    Fault("codes out of order", WEIGHTS, "0x7362", "0x6372", "80"),
    Fault("zero of the wrong sign", WEIGHTS, "128 - scale2", "128 + scale2", "80"),
    Fault("wrong half of the table", WEIGHTS, "codes >> 1 & 0x4444", "codes & 0x4444", "80", TABLE),
    Fault("a split is forgotten", EPILOGUE, "s < p.splits;", "s < p.splits - 1;", "80"),
    Fault("scales multiplied first", EPILOGUE, "fmul(fmul(int_to_float(sum), row_scale), weight_scale)", "fmul(int_to_float(sum), fmul(row_scale, weight_scale))", "80"),
    Fault("sum and bias contracted", MMA, "g.bias ? fadd(y, bias) : y", "ffma(fmul(int_to_float(sums[i][j][h * 2 + e]), row_scale), scale, bias)", "80"),
    Fault("gate of another image", EPILOGUE, "m / g.gate_tokens * g.rows", "(m + 1) / g.gate_tokens * g.rows", "80", INT8),
    Fault("stage filled before it is empty", WGMMA, EMPTY, "", "90"),
    Fault("empty of the wrong phase", WGMMA, "(slot.round - 1) & 1", "slot.round & 1", "90"),
    Fault("tile read before it is there", WGMMA, FULL, "", "90", INT8),
    Fault("codes read before they are there", WGMMA, "mbarrier_wait(ring.full(next.stage), next.round & 1);", "", "90"),
    Fault("registers filled while they are read", WGMMA, "wgmma_wait<1>();  // the last", "wgmma_wait<2>();  // the last", "90"),
    Fault("stage released while it is read", WGMMA, "    wgmma_wait<1>();\n    if (s) release", "    wgmma_wait<2>();\n    if (s) release", "90", INT8),
    Fault("no wait before the sums are read", WGMMA, "  wgmma_wait<0>();\n  release<T>(ring, last.stage);\n}\n\ntemplate", "  release<T>(ring, last.stage);\n}\n\ntemplate", "90", INT8),
    Fault("no wgmma fence", WGMMA, "    wgmma_fence();\n    DTQ_UNROLL for (int k = 0; k < 4; k++)\n      wgmma_s8", "    DTQ_UNROLL for (int k = 0; k < 4; k++)\n      wgmma_s8", "90"),
    Fault("K advances by half", WGMMA, ISSUE, ISSUE.replace("2 * k", "k"), "90"),
    Fault("sums not started at zero", WGMMA, ISSUE, ISSUE.replace("s || k", "true"), "90"),
    Fault("bytes expected too few", WGMMA, "ring.full(slot.stage), T::kStage)", "ring.full(slot.stage), T::kStage - 128)", "90"),
    Fault("both halves to one place", WGMMA, "load_box(ring.x(slot.stage) + rank * kHalf * T::kDepth", "load_box(ring.x(slot.stage)", "90"),
    Fault("empty counts one block", WGMMA, "T::kWarps * T::kCluster", "T::kWarps", "90"),
    Fault("stage released at home only", WGMMA, "r < T::kCluster; r++) mbarrier", "r < 1; r++) mbarrier", "90"),
    Fault("no cluster barrier at the start", WGMMA, "  if (T::kCluster > 1) sync_cluster();  // the other", "  // the other", "90"),
    Fault("no cluster barrier at the end", WGMMA, "    sync_warp();\n    sync_cluster();", "    sync_warp();", "90"),
    Fault("mbarriers not made visible", WGMMA, "    fence_mbarrier_init();\n", "", "90"),
    Fault("wrong swizzle", WGMMA, "swizzle = row / 2 % 4", "swizzle = row % 4", "90"),
    Fault("wrong half of a word", WGMMA, "t % 2 ? 0x7632 : 0x5410", "t % 2 ? 0x5410 : 0x7632", "90"),
    Fault("outputs not turned round", WGMMA, "const uint32_t pair = transpose_8x8(", "const uint32_t pair = (", "90"),
    Fault("groups past the end of K", WGMMA, "i / (4 / groups) < left ? i / (4 / groups) : left", "i / (4 / groups)", "90", TWO_LEVEL, True),
)  # fmt: skip

SHORT = ("no barrier in the loop", "registers filled while they are read")
"""What the test suite runs; the others take minutes."""


def survives(fault: Fault, work: Path) -> str:
    """Plant the fault in a copy of the sources and run the tests; "" when they noticed."""
    folder = work / fault.name.replace(" ", "-")
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / fault.file
    text = path.read_text()
    if fault.old not in text:
        return f"{fault.file} does not contain the text: {fault.old}"
    path.write_text(text.replace(fault.old, fault.new))
    program = folder / "program"
    how = SANITIZE if fault.asan else ()
    source = str(folder / "tests" / fault.program)
    command = ["g++", "-O1", *FLAGS, *how, f"-DDTQ_ONLY={fault.weights}", source, "-o"]
    built = subprocess.run([*command, str(program)], capture_output=True, text=True)
    if built.returncode:
        return f"does not compile: {built.stderr.strip()[:300]}"
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    try:
        done = subprocess.run(
            [str(program), "2", fault.arch],
            capture_output=True,
            timeout=300,
            env=os.environ | options,
        )
    except subprocess.TimeoutExpired:
        return ""  # it hangs: noticed
    finally:
        shutil.rmtree(folder)
    return "" if done.returncode else "the tests passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--short", action="store_true", help=f"only: {', '.join(SHORT)}")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [f for f in FAULTS if options.only in f.name]
    if options.short:
        chosen = [f for f in chosen if f.name in SHORT]
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
