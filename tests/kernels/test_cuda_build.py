# SPDX-License-Identifier: Apache-2.0
"""nvcc compiles every kernel for every architecture: the intended instructions, no spills."""

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


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", sorted(p.name for p in SOURCES.glob("*.cu")))
def test_it_compiles_and_spills_nothing(source, arch, shared_folder):
    target, output = sass.compiled(source, arch, shared_folder)
    # ptxas waits after every wgmma when it cannot prove that nothing writes its registers
    assert "serializ" not in output, output
    spilled = [line for line in output.splitlines() if re.search(r"[1-9]\d* bytes spill", line)]
    assert not spilled, output
    wanted = WANTED.get(source, {}).get(arch, ())
    if wanted and sass.tool() is not None:
        code = sass.disassembled(target, arch)
        assert not [instruction for instruction in wanted if instruction not in code]


def test_no_source_tells_sm_89_from_sm_80():
    """The machine code of both is made from one PTX: ``nvcc.device_flags``."""
    numbers = {
        int(number)
        for path in SOURCES.iterdir()
        if path.is_file()
        for number in re.findall(r"__CUDA_ARCH__\s*[<>=!]+\s*(\d+)", path.read_text())
    }
    assert {900, 1200} <= numbers
    assert not [number for number in numbers if 800 < number < 900]


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
