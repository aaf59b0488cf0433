# SPDX-License-Identifier: Apache-2.0
"""nvcc compiles every kernel for every architecture that has code of its own: the intended instructions, no spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import sass

SOURCES = Path(__file__).parent.parent.parent / "cuda_ext"
ARCHS = ("80", "89", "90a", "100", "120f")
IMMA = "IMMA.16832.S8.S8"
HOPPER = (
    "IGMMA.64x256x32.S8.S8", "IGMMA.64x128x32.S8.S8", "UTMALDG.2D.MULTICAST", "UTMASTG.2D",
    "ACQBULK",  # griddepcontrol.wait
)  # fmt: skip
GEMM = dict.fromkeys(ARCHS, (IMMA,)) | {"90a": (IMMA, *HOPPER)}
HMMA = dict.fromkeys(ARCHS, ("HMMA.16816.F32.BF16", "HMMA.16816.F32 "))
WANTED = {
    "gemm_int8.cu": GEMM,
    "gemm_two_level.cu": GEMM,
    "gemm_table.cu": GEMM,
    "gemm_fp4.cu": {"120f": ("OMMA.SF.16864.F32.E2M1.E2M1",)},
    "weights.cu": HMMA,
    "rows.cu": {"90a": ("PREEXIT",)},  # griddepcontrol.launch_dependents
}
"""Instructions that the machine code of a file must contain; other files may have any."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc"),
]


FILES = sorted(p.name for p in SOURCES.glob("*.cu"))
COMPILED = [(s, arch) for s in FILES for arch in ARCHS if arch not in sass.LEFT_OUT.get(s, ())]


@pytest.mark.parametrize(("source", "arch"), COMPILED)
def test_it_compiles_and_spills_nothing(source, arch, shared_folder):
    target, output = sass.compiled(source, arch, shared_folder)
    assert ("entry function" in output) == (source != "gemm.cu"), output
    # ptxas waits after every wgmma when it cannot prove that nothing writes its registers
    assert "serializ" not in output, output
    spilled = [line for line in output.splitlines() if re.search(r"[1-9]\d* bytes spill", line)]
    assert not spilled, output
    wanted = WANTED.get(source, {}).get(arch, ())
    if wanted and sass.tool() is not None:
        code = sass.disassembled(target, arch)
        assert not [instruction for instruction in wanted if instruction not in code]


def test_what_is_left_out_has_the_code_of_what_is_compiled():
    """The machine code of sm_80 and sm_89 is made from one PTX: ``nvcc.device_flags``."""
    texts = {path.name: path.read_text() for path in SOURCES.iterdir() if path.is_file()}
    compared = re.compile(r"__CUDA_ARCH(?:_FAMILY_SPECIFIC_)?_\w*\s*[<>=!]+\s*(\d+)")
    conditions = {(name, int(n)) for name, text in texts.items() for n in compared.findall(text)}
    assert conditions == {("arch.cuh", 900), ("arch.cuh", 1200), ("gemm_mma.cuh", 1200)}
    assert {n for n in texts if "DTQ_HAS_FP4" in texts[n]} == {"arch.cuh", "gemm_fp4.cuh"}
    *defined, used = re.findall(r".*\bkTableBlocks\b.*", "".join(texts.values()))
    assert len(defined) == 2
    assert "kIsTable ? kTableBlocks" in used
    for source, archs in sass.LEFT_OUT.items():
        if source != "gemm.cu":
            assert not {"80", "89"} <= {*archs}, source
            assert not {"90a"} & {*archs}, source
            assert not {"100", "120f"} <= {*archs}, source
    assert not {"100", "120f"} & {*sass.LEFT_OUT.get("gemm_table.cu", ())}
    assert not {"100", "120f"} & {*sass.LEFT_OUT.get("gemm_fp4.cu", ())}


@pytest.mark.parametrize("arch", ["80", "90a", "120f"])
def test_the_kernels_of_single_instructions_compile(arch, tmp_path):
    flags = ["-std=c++20", "-O1", f"-arch=sm_{arch}", "-Xptxas=-v", "-Werror=all-warnings"]
    source, target = SOURCES / "tests/golden.cu", tmp_path / "golden.so"
    part = ["-shared", "-Xcompiler=-fPIC"] if arch == "90a" else ["-cubin"]
    command = ["nvcc", *flags, *part, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    assert "ignored" not in output, output  # setmaxnreg, where a kernel's registers are not known
    assert "serializ" not in output, output


def test_the_test_for_a_gpu_compiles(tmp_path):
    flags = ["-std=c++17", "-Xcicc=-O0", "-Xptxas=-O0", "-arch=sm_80", "-DDTQ_ONLY=1", "-x", "cu"]
    source, program = SOURCES / "tests/test_gemm.cpp", tmp_path / "test_gemm"
    command = ["nvcc", *flags, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
