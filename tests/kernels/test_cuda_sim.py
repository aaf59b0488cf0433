# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a CPU: their sources, compiled for the block emulator of cuda_ext/sim."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import agreement
import pytest
import torch
from launch_structs import Gemm

from dtq.formats.integer import TwoLevelInt
from dtq.formats.packing import pack_bits
from dtq.kernels import ops_quantize

reference = torch.ops.dtq_reference
SOURCES = Path(__file__).parent.parent.parent / "cuda_ext"
COMPILE = ("g++", "-std=c++20", "-ffp-contract=off", "-DDTQ_SIM", "-w")
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-sanitize=null,object-size,pointer-overflow",  # address sanitizer finds what these would access
)
# address sanitizer cannot follow frames from one fiber's stack to the heap
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

pytestmark = [
    pytest.mark.slow,  # they compile
    pytest.mark.skipif(not shutil.which("g++"), reason="the emulator needs g++"),
]


def call(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    output = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok"))
    assert done.returncode == 0, f"{command[0]}\n{output}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def gemm(tmp_path_factory):
    """(program, library) of the GEMM kernels and their tests."""
    folder = tmp_path_factory.mktemp("gemm")
    built, program, library = folder / "gemm.o", folder / "test_gemm", folder / "gemm.so"
    call(*COMPILE, "-O1", "-fPIC", "-c", SOURCES / "tests/test_gemm.cpp", "-o", built)
    call("g++", built, "-o", program)
    call("g++", "-shared", built, "-o", library)
    return program, library


def test_the_gemm_kernels_on_the_emulator(gemm):
    output = call(gemm[0], "1:2")  # seed 0 is that of the next test
    for kernel in (
        "mma 16x128",
        "mma 64x64",
        "mma 128x128",
        "any alignment",
        "wgmma 256x128",
        "wgmma 128x128",
        "fp4 128x128",
        "fp4 64x64",
    ):
        assert kernel in output, "the plan no longer reaches it"


def test_the_gemm_kernels_touch_only_their_memory(tmp_path):
    program = tmp_path / "test_gemm"
    call(*COMPILE, *SANITIZE, "-O1", SOURCES / "tests/test_gemm.cpp", "-o", program)
    call(program, 1, env=os.environ | OPTIONS)


def test_every_fault_has_its_place():
    tables = list((SOURCES / "sim").glob("faults_*.toml"))
    faults = [f for table in tables for f in tomllib.loads(table.read_text())["fault"]]
    assert len(faults) > 30
    for fault in faults:
        assert fault["old"] in (SOURCES / fault["file"]).read_text(), fault["name"]


def test_planted_faults_are_detected():
    output = call(sys.executable, SOURCES / "sim/mutate.py", "--short")
    noticed = [line for line in output.splitlines() if line.startswith("noticed")]
    assert len(noticed) >= 2, output


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def product(library, arch, seed, codes, row_scale, weight, weight_scale, bias, dtype, **parts):
    """The output of the kernel for ``arch``, and its name."""
    out = torch.full((len(codes), len(weight)), float("nan"), dtype=dtype)
    g = Gemm(
        tokens=len(codes),
        rows=len(weight),
        columns=codes.shape[1],
        x_q=codes.data_ptr(),
        row_scale=row_scale.data_ptr(),
        weight=weight.data_ptr(),
        weight_scale=weight_scale.data_ptr(),
        out=out.data_ptr(),
        out_type=DTYPES[dtype],
        arch=arch,
        sms=8,
        **parts,
    )
    if bias is not None:
        g.bias, g.bias_type = bias.data_ptr(), DTYPES[bias.dtype]
    library.dtq_gemm_workspace.restype = ctypes.c_int64
    library.dtq_gemm_kernel.restype = ctypes.c_char_p
    library.dtq_sim_error.restype = ctypes.c_char_p
    workspace = torch.empty(library.dtq_gemm_workspace(ctypes.byref(g)), dtype=torch.int8)
    g.workspace, g.workspace_bytes = workspace.data_ptr(), len(workspace)
    library.dtq_sim_seed(ctypes.c_uint64(seed))
    status = library.dtq_gemm(ctypes.byref(g), None)
    assert status == 0, (status, library.dtq_sim_error())
    return out, library.dtq_gemm_kernel(ctypes.byref(g)).decode()


# (M, N, K): around tiles of 16, 64, 128 and 256 tokens
SHAPES = [(1, 48, 1152), (16, 130, 256), (17, 65, 128), (127, 96, 192), (300, 257, 384)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("arch", [80, 90])
def test_w4a8_gives_the_bits_of_the_reference(gemm, arch, m, n, k):
    library = ctypes.CDLL(str(gemm[1]))
    group = 128 if k % 128 == 0 else 64
    fmt = TwoLevelInt(f"int4-two-level-g{group}", group)
    w = torch.randn(n, k, generator=seeded(0)) * torch.rand(n, 1, generator=seeded(1))
    parts = fmt.pack(w, fmt.compute_qparams(w))
    weight, scale = parts["weight"], parts["weight_scale"].contiguous()
    x = torch.randn(m, k, generator=seeded(2))
    codes, row_scale = reference.quantize_rows(x, None, 1, None)
    for dtype in DTYPES:
        bias = torch.randn(n, generator=seeded(3)).to(dtype)
        args = (codes, row_scale, weight, scale)
        want = reference.w4a8_linear(*args, parts["weight_scale_2"], bias, dtype)
        groups = parts["weight_scale_2"].data_ptr()
        two_level = {"weights": 1, "groups": groups, "group": group}
        got, name = product(library, arch, m, *args, bias, dtype, **two_level)
        assert torch.equal(got, want), (name, dtype)


@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (5, 9, 77), (130, 64, 1)])
@pytest.mark.parametrize("arch", [80, 90])
def test_w8a8_gives_the_bits_of_the_reference(gemm, arch, m, n, k):
    library = ctypes.CDLL(str(gemm[1]))
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=seeded(0))
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=seeded(1))
    row_scale, scale = torch.rand(m, generator=seeded(2)), torch.rand(n, 1, generator=seeded(3))
    for dtype, bias in ((torch.bfloat16, None), (torch.float32, torch.randn(n))):
        args = (codes, row_scale, weight, scale, bias, dtype)
        got, name = product(library, arch, m, *args)
        assert torch.equal(got, reference.w8a8_linear(*args)), name


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("group", [32, 192])
def test_tables_give_the_bits_of_the_expanded_weight(gemm, arch, group):
    library = ctypes.CDLL(str(gemm[1]))
    m, n, k = 140, 260, 192
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=seeded(0))
    index = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=seeded(1))
    shape = (n, k // group, 16)
    tables = torch.randint(-128, 128, shape, dtype=torch.int8, generator=seeded(2))
    row_scale, scale = torch.rand(m, generator=seeded(3)), torch.rand(n, 1, generator=seeded(4))
    expanded = tables.gather(2, index.long().unflatten(1, (-1, group))).flatten(1)
    want = reference.w8a8_linear(codes, row_scale, expanded, scale, None, torch.bfloat16)
    args = (codes, row_scale, pack_bits(index, 4), scale, None, torch.bfloat16)
    table = {"weights": 2, "codebooks": tables.data_ptr(), "group": group}
    got, name = product(library, arch, 7, *args, **table)
    assert torch.equal(got, want), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_gate_and_residual_give_the_bits_of_torch_and_gelu_nearly(gemm, arch, dtype):
    """In every kernel that writes outputs: whole tiles, tails, and sums over split K."""
    library = ctypes.CDLL(str(gemm[1]))
    seen = set()
    for m, n, k in [(6, 48, 1152), (300, 257, 384), (33, 7, 77), (520, 512, 128)]:
        codes = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=seeded(0))
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=seeded(1))
        # sums of a few units: where GELU is not linear
        row_scale = torch.rand(m, generator=seeded(2)) * 5e-3 / k**0.5
        scale = torch.rand(n, 1, generator=seeded(3)) * 0.1
        bias = torch.randn(n, generator=seeded(4)).to(dtype)
        images = 3 if m % 3 == 0 else 1
        gate = torch.randn(images, n, generator=seeded(5)).to(dtype)
        residual = torch.randn(m, n, generator=seeded(6)).to(dtype)
        x = reference.w8a8_linear(codes, row_scale, weight, scale, bias, torch.float32)
        y, each = ops_quantize.gelu(x), gate.float().repeat_interleave(m // images, 0)
        args = (codes, row_scale, weight, scale, bias, dtype)
        got, name = product(library, arch, m, *args, gelu=True)
        assert agreement.near_gelu(got, y.to(dtype), None).all(), (name, m, n, k)
        gates = {"gate": gate.data_ptr(), "gate_tokens": m // images}
        gates["residual"] = residual.data_ptr()
        got, _ = product(library, arch, m, *args, **gates)
        assert torch.equal(got, (each * x + residual.float()).to(dtype)), (name, m, n, k)
        got, _ = product(library, arch, m, *args, gelu=True, **gates)
        want = (each * y + residual.float()).to(dtype)
        assert agreement.near_gelu(got, want, residual).all(), (name, m, n, k)
        seen.add(name.split(",")[0])
    assert len(seen) >= 3, seen
