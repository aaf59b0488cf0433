# SPDX-License-Identifier: Apache-2.0
"""The CUDA library without a GPU: its binding on the emulator, its compilation, the dispatcher."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import agreement
import emulated
import gpu_options
import products
import pytest
import torch

from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.formats.gguf import HalfBlock, KQuant
from dtq.formats.lut_two_level import TwoLevelLut
from dtq.io.package_data import folder
from dtq.kernels import CPU, CUDA, LinearProblem, explain, gpu_dispatch, int8_gemm, pick
from dtq.kernels.compile import compiler, cuda, format_codes, gcc, nvcc
from dtq.kernels.compile.compiler import Unavailable
from dtq.kernels.compile.library import Library
from dtq.kernels.kernel import Epilogue, LinearCall
from dtq.kernels.ops_weight import WEIGHT_CACHE
from dtq.linalg.hadamard import rotate

ROOT = Path(__file__).parent.parent.parent
sim, reference = torch.ops.dtq_sim, torch.ops.dtq_reference


# ------------------------------------------------------------------------------------- binding


@pytest.fixture(params=[80, 90, 120], ids=["sm_80", "sm_90", "sm_120"])
def emulator(request):
    library = emulated.library()
    library.dtq_sim_arch(request.param)
    before = library.dtq_cuda_references()
    yield library
    assert library.dtq_cuda_references() == before, "an op ran the torch reference"


@pytest.mark.parametrize("library", [CPU, CUDA], ids=lambda library: library.device)
def test_a_library_lists_the_ops_that_its_sources_implement(library):
    sources = folder(f"{library.device}_ext").glob("*.cpp")
    named = [n for s in sources for n in re.findall(r'm\.impl\("(\w+)"', s.read_text())]
    assert sorted(library.ops) == sorted(named)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("check", agreement.CHECKS, ids=lambda c: c.__name__)
def test_the_binding_gives_the_bits_of_the_reference(emulator, check, seed):
    emulator.dtq_sim_seed(seed)
    check(sim, "cpu", seed, 10**6)


@pytest.mark.slow
@pytest.mark.parametrize("emulator", [120], indirect=True, ids=["sm_120"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("check", agreement.FP4, ids=lambda c: c.__name__)
def test_fp4_products_are_near_the_reference(emulator, check, seed):
    emulator.dtq_sim_seed(seed)
    check(sim, "cpu", seed, 10**6)


GPUS = {
    (8, 0): (108,), (8, 6): (46, 84), (8, 9): (58, 128, 142), (9, 0): (78, 114, 132), (10, 0): (148,),
    (12, 0): (70, 170, 188), (12, 1): (48,),
}  # fmt: skip
"""Multiprocessors of GPUs, by compute capability."""


@pytest.mark.parametrize("capability", GPUS)
def test_the_products_of_the_gpu_script_reach_every_kernel_of_large_tiles(capability):
    library, arch = emulated.library(), 10 * capability[0] + capability[1]
    for count in GPUS[capability]:

        def name_of(*sizes, count=count):
            m, n, k, group = sizes
            return library.dtq_cuda_gemm(arch, count, m, n, k, group).decode()

        assert products.missing(capability, name_of) == [], count


def test_a_kernel_that_no_product_reaches_is_named():
    gaps = products.missing((9, 0), lambda *sizes: "mma 64x64")
    assert "two-level g64 to bfloat16: wgmma 256x128" in gaps
    assert len(gaps) == 2 * len(products.CASES)
    few = products.missing((12, 0), lambda m, n, k, group: "mma 128x128, fp4 64x64")
    assert few == [f"{case.name}: fp4 128x128" for case in products.FP4]


@pytest.mark.slow
@pytest.mark.parametrize("emulator", [90, 120], indirect=True, ids=["sm_90", "sm_120"])
def test_products_of_large_tiles_on_the_emulator(emulator, request):
    """The emulator has 8 multiprocessors, so smaller sizes reach the same kernels."""
    hopper, size = "sm_90" in request.node.name, (516, 513, 384)
    for case in products.CASES if hopper else products.FP4:
        name = emulator.dtq_cuda_gemm(90 if hopper else 120, 8, *size, case.group_of(size[2]))
        assert name.decode() == ("wgmma 256x128" if hopper else "fp4 128x128")
        products.run(sim, "cpu", case, size)
    for name in products.WEIGHT_FORMATS if hopper else ():
        products.weight_only(sim, "cpu", name, (4, 200, 1152))


@pytest.mark.slow
@pytest.mark.parametrize("mx", [False, True])
def test_fp4_rows_at_the_ends_of_the_range(emulator, mx):
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4)
    x = torch.stack([ties, -ties, ties * 2**-100, ties * 1e-38, ties * 3e37, ties * 0, ties, ties])
    x[6, 3], x[7, 5] = torch.nan, -torch.inf
    got, want = (
        o(x, None, None, 1, 1, mx) for o in (sim.fp4_quantize_rows, reference.fp4_quantize_rows)
    )
    assert torch.equal(got[2].isnan(), torch.arange(8) >= 6)
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=0, equal_nan=True)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a[:6].view(torch.uint8), b[:6].view(torch.uint8))
    for rows, columns in ((2, 32), (3, 20000 - 20000 % 32)):  # longer than the registers of a block
        x = agreement.normal(rows, columns + 8)[:, 4:-4]  # not aligned
        got, want = (
            o(x, None, None, 32, 1, mx)
            for o in (sim.fp4_quantize_rows, reference.fp4_quantize_rows)
        )
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(got, want, strict=True)
        )
    with pytest.raises(RuntimeError, match="whole groups"):
        sim.fp4_quantize_rows(torch.ones(2, 40), None, None, 1, 1, mx)


@pytest.mark.slow
def test_fp4_operands_that_do_not_fit_are_an_error(emulator):
    x = agreement.normal(3, 128)
    codes, scales, rows = reference.fp4_quantize_rows(x, None, None, 1, 1, False)
    right = [codes, rows, codes[:2].clone(), scales[:2].clone(), scales, None, None, False]
    for message, place, wrong in (
        ("x_block_scale is float32, expected float8_e4m3fn", 4, scales.float()),
        ("x_block_scale has 8 elements, expected 24", 4, scales[:1].clone()),
        ("weight_scale is uint8, expected float8", 3, scales[:2].view(torch.uint8)),
        ("does not fit the weight", 2, codes[:2, :32].clone()),
        ("one scale per token", 1, rows[:2].clone()),
        ("weight_scale_2 has 2 elements, expected 1", 5, torch.ones(2)),
    ):
        args = [wrong if i == place else given for i, given in enumerate(right)]
        with pytest.raises(RuntimeError, match=message):
            sim.fp4_linear(*args, None, None, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", format_codes.decoded())
def test_every_format_is_decoded(emulator, name):
    fmt, w = FORMATS[name], agreement.normal(67, 256) * 0.1
    parts = fmt.pack(w, fmt.compute_qparams(w))
    stored = (list(parts.values()), list(parts), name, 256, torch.bfloat16)
    assert torch.equal(sim.dequantize(*stored), fmt.unpack(parts).to(torch.bfloat16))


@pytest.mark.slow
def test_nothing_to_do_launches_nothing(emulator):
    codes, one = agreement.int8(0, 64), torch.ones(5, 1)
    y = sim.w8a8_linear(codes, torch.ones(0), agreement.int8(5, 64), one, None, torch.bfloat16)
    assert (y.shape, y.dtype) == ((0, 5), torch.bfloat16)
    assert sim.quantize_rows(torch.ones(0, 64), None, 64, None)[0].shape == (0, 64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_transformed_input_is_rounded_in_the_same_pass(emulator, dtype):
    for k, order, rotations in ((1152, None, 1), (1184, None, 1), (100, None, 2), (64, True, 2)):
        x = (agreement.normal(5, k) * 3).to(dtype)
        order = None if order is None else torch.randperm(k, dtype=torch.int32)
        args = x, (torch.rand(k) + 0.5).bfloat16(), order, 4 if k % 32 else 32, rotations
        got = sim.round_rows(*args, "none", dtype)
        assert torch.equal(got, reference.transform_rows(*args).to(dtype)), (k, rotations)
        assert torch.equal(got, reference.round_rows(*args, "none", dtype))


@pytest.mark.slow
def test_slices_are_read_in_place(emulator):
    x = agreement.normal(9, 200)[:, 8:136]
    got, want = sim.quantize_rows(x, None, 64, None), reference.quantize_rows(x, None, 64, None)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.slow
def test_operands_that_do_not_fit_are_an_error(emulator):
    codes, one = agreement.int8(3, 64), torch.ones
    weight, cut = agreement.int8(5, 64), agreement.int8(5, 128)[:, ::2]

    right = {"x_q": codes, "row": one(3), "weight": weight, "scale": one(5, 1), "bias": None}

    for message, wrong in {
        "does not fit the weight": {"weight": agreement.int8(5, 63)},
        "one scale per token": {"row": one(2)},
        "bias has 4 elements, expected 5": {"bias": one(4)},
        "weight is not contiguous": {"weight": cut},
        "row_scale is float64, expected float32": {"row": one(3).double()},
        "x_q is uint8, expected int8": {"x_q": codes.view(torch.uint8)},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            sim.w8a8_linear(*(right | wrong).values(), torch.float32)
    then = {"bias": None, "gelu": True, "gate": one(1, 5), "residual": one(3, 5)}
    for message, wrong in {
        "a gate comes with a residual": {"residual": None},
        "gate must be .images, 5.": {"gate": one(2, 5)},
        "residual must be .3, 5.": {"residual": one(3, 4)},
        "gate is bfloat16, expected float32": {"gate": one(1, 5).bfloat16()},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            sim.w8a8_epilogue_linear(*(right | then | wrong).values(), torch.float32)
    then |= {"dtype": torch.float32, "low": one(3, 16).half(), "up": one(5, 16).half()}
    for message, wrong in {
        "two factors": {"up": None},
        "low is float32, expected bfloat16 or float16": {"low": one(3, 16)},
        "up is bfloat16, expected float16": {"up": one(5, 16).bfloat16()},
        "low must be .3, rank.": {"low": one(4, 16).half()},
        "up must be .5, 16.": {"up": one(5, 32).half()},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            sim.w8a8_epilogue_linear(*(right | then | wrong).values())
    view = torch.zeros(81).half()[1:].reshape(5, 16)  # contiguous, and at an odd address
    for name, low, up in (("low", view[:3], one(5, 16).half()), ("up", one(3, 16).half(), view)):
        with pytest.raises(RuntimeError, match=f"{name} starts at an address .* of 4 bytes; clone"):
            sim.w8a8_epilogue_linear(*(right | then | {"low": low, "up": up}).values())
    packed = codes, one(3), agreement.int8(5, 32), one(5, 1)
    for message, tables in {
        "tables must be .5, groups.": agreement.int8(4, 2, 16),
        "tables must have 16 entries": agreement.int8(5, 2, 8),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            sim.lut4a8_linear(*packed, tables, None, torch.float32)
    with pytest.raises(RuntimeError, match="whole blocks of 64"):
        sim.quantize_rows(one(2, 96), None, 64, None)
    with pytest.raises(RuntimeError, match="qmax is 200"):
        sim.quantize_rows(one(2, 64), None, 64, None, 200)
    up = one(2, 64)
    with pytest.raises(RuntimeError, match="a multiple of the images"):
        sim.norm_quantize_rows(one(3, 64), up, up, 1e-6, None, None, 64, 1, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", format_codes.decoded())
def test_a_weight_whose_parts_do_not_fit_is_an_error(emulator, name):
    fmt, w = FORMATS[name], agreement.normal(16, 256) * 0.1
    right = fmt.pack(w, fmt.compute_qparams(w))

    def decode(parts, columns=256):
        stored = (list(parts.values()), list(parts), name, columns, torch.bfloat16)
        return sim.dequantize(*stored)

    def linear(parts):
        return sim.weight_linear(torch.ones(2, 256), list(parts.values()), list(parts), name, None)

    for part, tensor in right.items():
        longer = {**right, part: torch.cat([tensor, tensor])}
        if part != "weight":  # its rows define the number of rows
            with pytest.raises(RuntimeError, match=f"{name} of .16, 256.: {part} has"):
                decode(longer)
        elif "weight_scale" in right:
            with pytest.raises(RuntimeError, match=f"{name} of .32, 256.: weight_.* expected"):
                linear(longer)
        if part not in ("weight", "weight_zero_point"):  # the offset replaces zero points
            with pytest.raises(RuntimeError, match=f"{name} lacks {part}"):
                decode({k: v for k, v in right.items() if k != part})
        with pytest.raises(RuntimeError, match=f"{part} has 1 dimensions"):
            decode({**right, part: tensor.reshape(-1)})
    with pytest.raises(RuntimeError, match="expected"):
        decode(right, columns=512)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vq-256x4", "vq-64x2"])
def test_a_codebook_at_an_odd_address_is_an_error(emulator, name):
    fmt, w = FORMATS[name], agreement.normal(16, 256) * 0.1
    parts = fmt.pack(w, fmt.compute_qparams(w))
    lut = parts["weight_lut"]
    moved = torch.cat([torch.zeros(1).bfloat16(), lut.reshape(-1)])[1:].reshape(lut.shape)
    assert moved.data_ptr() % 4 == 2
    given = parts | {"weight_lut": moved}
    with pytest.raises(RuntimeError, match="weight_lut starts at an address"):
        sim.dequantize(list(given.values()), list(given), name, 256, torch.bfloat16)


@pytest.mark.slow
def test_a_problem_without_a_kernel_goes_to_the_reference():
    library = emulated.library()
    before = library.dtq_cuda_references()
    x = agreement.normal(3, 64).double()
    got, want = sim.quantize_rows(x, None, 64, None), reference.quantize_rows(x, None, 64, None)
    assert torch.equal(got[0], want[0])
    library.dtq_sim_arch(75)
    x = x.float()
    assert torch.equal(sim.quantize_rows(x, None, 64, None)[0], want[0])
    library.dtq_sim_arch(90)
    assert library.dtq_cuda_references() == before + 2


@pytest.mark.slow
def test_the_library_names_the_kernel_of_a_product():
    ask = emulated.library().dtq_cuda_gemm
    assert ask(90, 132, 4096, 3072, 3072, 0).startswith(b"wgmma")
    assert ask(90, 132, 4096, 3072, 3072, 128).startswith(b"wgmma")
    assert ask(80, 108, 4096, 3072, 3072, 0).startswith(b"mma")
    assert b"8.0" in ask(75, 40, 4096, 3072, 3072, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w8a8", "w4a8"])
def test_kernels_that_are_not_the_default_give_its_bits(name):
    """Through the binding, as ``make gpu`` chooses them; each cluster of 8 multiprocessors has tiles."""
    library, m, k, n = emulated.library(), 520, 128, 520
    library.dtq_sim_arch(90)
    chain = gpu_options.chains(torch.device("cpu"), k, n, sim)[name]
    both = gpu_options.PERSISTENT | gpu_options.DEPENDENT
    with gpu_options.options(library, both):
        used = library.dtq_cuda_gemm(90, 8, m, n, k, 0 if name == "w8a8" else 64)
    assert used.decode() == gpu_options.NAME
    assert library.dtq_cuda_gemm(90, 8, m, n, k, 0) == b"wgmma 256x128"
    assert gpu_options.wrong_inputs(library, torch.device("cpu"), chain, m, k, both, 1) == 0


# ------------------------------------------------------------------------------------- building


def test_every_source_is_compiled_or_included():
    names = {p.name for p in compiler.sources(folder("cuda_ext"))}
    assert set(nvcc.SOURCES) <= names
    text = "".join((folder("cuda_ext") / name).read_text() for name in names)
    unused = [n for n in names - set(nvcc.SOURCES) if f'"{n}"' not in text]
    assert not unused


@pytest.mark.parametrize("flags", [gcc, nvcc], ids=["cpu", "cuda"])
def test_a_change_of_any_source_changes_the_name_of_the_library(flags, tmp_path):
    name = "cpu_ext" if flags is gcc else "cuda_ext"
    for copied in (name, "common_ext"):
        shutil.copytree(ROOT / copied, tmp_path / "before" / copied)
    key = flags.key(tmp_path / "before" / name)
    assert key == flags.key(ROOT / name)
    files = [*compiler.sources(ROOT / name), *compiler.common(ROOT / name)]
    assert {path.parent.name for path in files} == {name, "common_ext"}
    for i, path in enumerate(files):
        shutil.copytree(tmp_path / "before", tmp_path / str(i))
        with open(tmp_path / str(i) / path.parent.name / path.name, "a") as file:
            file.write("\n")
        assert flags.key(tmp_path / str(i) / name) != key, path


def test_one_command_for_each_source_and_one_that_links(tmp_path):
    compiling, linking = nvcc.build("nvcc", folder("cuda_ext"), ("80", "90a")).commands(
        Path("/torch"), tmp_path
    )
    assert len(compiling) == len(nvcc.SOURCES)
    kernels = next(c for c in compiling if c[-3].endswith("gemm_int8.cu"))
    assert "-gencode=arch=compute_90a,code=sm_90a" in kernels
    assert "-gencode=arch=compute_80,code=compute_80" in kernels
    binding = next(c for c in compiling if c[-3].endswith("ops_rows.cpp"))
    assert '-DDTQ_ARCHS="sm_80 sm_90a and PTX"' in binding
    assert {f"-Xlinker={nvcc.LINKED}", "-cudart=static"} <= set(linking)
    assert all(c[-1] in linking for c in compiling)


def test_architectures():
    assert nvcc.arch_of((9, 0)) == "90a"
    assert nvcc.arch_of((8, 6)) == "86"
    assert nvcc.arch_of((12, 1)) == "121a"
    assert set(nvcc.wanted_archs()) >= {"80", "90a", "100", "120f"}


def test_architectures_can_be_named(monkeypatch):
    monkeypatch.setenv("DTQ_CUDA_ARCHS", "80; 90a")
    assert nvcc.wanted_archs() == ("80", "90a")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_there_is_a_reason():
    with pytest.raises(Unavailable, match=r"without CUDA|no GPU"):
        CUDA.check()
    assert "torch reference" in CUDA.describe()
    assert [name for name, state in CUDA.levels() if state.startswith("used")] == [
        "torch reference"
    ]
    assert all("without CUDA" in state or "no GPU" in state for _, state in CUDA.levels())


@pytest.mark.parametrize(
    ("capabilities", "builds"),
    [([(7, 5), (9, 0)], "sm_90a"), ([(8, 0), (8, 9)], "sm_80+sm_89"), ([(6, 1), (7, 5)], None)],
)
def test_an_old_gpu_does_not_affect_a_new_one(capabilities, builds, monkeypatch):
    monkeypatch.delenv("DTQ_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "capabilities", lambda: capabilities)
    if builds is None:
        with pytest.raises(Unavailable, match="sm_75: kernels begin with sm_80"):
            CUDA.check()
        return
    CUDA.check()
    assert CUDA.builds() == builds
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA A10")
    monkeypatch.setattr(CUDA, "load", lambda: True)
    limits = [gpu_dispatch._limits(i) for i in range(2)]
    assert [small_m for small_m, _ in limits] == [16 if c >= (8, 0) else -1 for c in capabilities]


@pytest.mark.parametrize(
    ("driver", "runtime", "reason"),
    [
        (12080, 13000, "supports CUDA 12.8, and .* was built with 13.0: update the driver"),
        (13000, 13020, ""),  # minor versions of a major one are compatible
        (13010, 12060, ""),
        (12020, 12090, ""),
        (None, 13000, ""),
        (12080, None, ""),
    ],
)
def test_a_library_that_is_newer_than_the_driver_is_not_loaded(
    driver, runtime, reason, tmp_path, monkeypatch
):
    monkeypatch.setattr(cuda, "driver_version", lambda: driver)
    monkeypatch.setattr(nvcc, "find", lambda *homes: "nvcc")
    monkeypatch.setattr(nvcc, "major_version", lambda compiler: 12)
    here = library(tmp_path, monkeypatch, check_file=cuda._check_file, compiler=cuda._compiler)
    here.cached().parent.mkdir()
    here.cached().write_bytes(b"junk\0dtq cudart %d\0" % runtime if runtime else b"junk")
    state = dict(here.levels())["user cache"]
    if not reason:
        assert state == f"used: {here.cached()}"
        assert here.existing() == here.cached()
        return
    assert re.search(reason, state)
    assert here.existing() is None
    with pytest.raises(Unavailable, match=reason):
        here.open(here.cached())
    # an older nvcc compiles a library that replaces it
    assert dict(here.levels())["compiled at first use"].startswith("used: by ")
    here._compiled()
    assert here.cached().read_text() == "junk"


def test_a_library_that_cannot_be_read_is_a_reason(tmp_path, monkeypatch):
    here = library(tmp_path, monkeypatch, check_file=cuda._check_file)
    here.cached().mkdir(parents=True)
    assert here.existing() is None
    assert "Is a directory" in dict(here.levels())["user cache"]


def test_a_file_is_a_reason_only_where_a_library_can_be_used(tmp_path, monkeypatch):
    def fail(reason):
        raise Unavailable(reason)

    for check, reason in (
        (lambda: fail("no GPU"), "no GPU"),
        (lambda: None, "an old file; no nvcc"),
    ):
        here = library(
            tmp_path, monkeypatch, check=check, check_file=lambda path: fail("an old file"),
            compiler=lambda: fail("no nvcc"),
        )  # fmt: skip
        here.cached().parent.mkdir(exist_ok=True)
        here.cached().write_text("junk")
        assert not here.load()
        assert here.reason == reason


def test_a_file_of_another_process_is_used(tmp_path, monkeypatch):
    here = library(tmp_path, monkeypatch)
    monkeypatch.setattr(here, "existing", lambda: tmp_path / "packaged.so")
    assert here._compiled() == tmp_path / "packaged.so"
    assert not here.cached().exists()


def test_an_nvcc_that_is_newer_than_the_driver_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "driver_version", lambda: 12080)
    monkeypatch.setattr(nvcc, "find", lambda *homes: "nvcc")
    monkeypatch.setattr(nvcc, "major_version", lambda compiler: 13)
    here = library(tmp_path, monkeypatch, check_file=cuda._check_file, compiler=cuda._compiler)
    expected = "the driver supports CUDA 12.8, and nvcc is of CUDA 13"
    assert expected in dict(here.levels())["compiled at first use"]
    assert expected in here.describe()
    here.cached().parent.mkdir()
    here.cached().write_bytes(b"dtq cudart 13000")
    assert not here.load()
    for part in (str(here.cached()), expected):  # both levels say why
        assert part in here.reason


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_compiler_names_its_version(tmp_path):
    major = nvcc.major_version(shutil.which("nvcc"))
    assert 12 <= major < 100
    for text, message in (("exit 1", "--version"), ("echo of a dream", "names no release")):
        program = tmp_path / f"nvcc{len(text)}"
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        with pytest.raises(Unavailable, match=message):
            nvcc.major_version(str(program))


def library(tmp_path, monkeypatch, **changed) -> Library:
    """A library that a stand-in compiles."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DTQ_KERNELS", raising=False)

    def compile_it(work: Path) -> Path:
        (work / "library.so").write_text("junk")
        return work / "library.so"

    given = {"key": lambda: "k", "compile": compile_it, "compiler": lambda: "nvcc"} | changed
    return Library("test", "TEST", ("quantize_rows",), **given)


def test_levels_from_the_first_to_the_last(tmp_path, monkeypatch):
    def none():
        raise Unavailable("no nvcc")

    here = library(tmp_path, monkeypatch)
    assert dict(here.levels())["compiled at first use"] == "used: by nvcc"
    without = library(tmp_path, monkeypatch, compiler=none)
    assert dict(without.levels())["compiled at first use"] == "no nvcc"
    assert dict(without.levels())["torch reference"] == "used"
    here.build(here.cached())
    assert dict(without.levels())["user cache"].startswith("used: ")
    monkeypatch.setenv("DTQ_KERNELS", "0")
    assert dict(here.levels())["torch reference"] == "used: DTQ_KERNELS=0"


def test_it_is_compiled_once_with_a_message(tmp_path, monkeypatch, capsys):
    here = library(tmp_path, monkeypatch, builds=lambda: "sm_90a", compile_seconds=90)
    monkeypatch.setattr(here, "open", lambda path: path)
    assert here.load()
    message = capsys.readouterr().err
    assert message == "dtq: compiling TEST kernels for sm_90a, once (~90 s)\n"
    assert here.path == tmp_path / "dtq" / "dtq_test-k-sm_90a.so"
    again = library(tmp_path, monkeypatch, builds=lambda: "sm_90a")
    monkeypatch.setattr(again, "open", lambda path: path)
    assert again.load()
    assert capsys.readouterr().err == ""


def test_a_library_that_does_not_load_is_a_reason(tmp_path, monkeypatch, caplog):
    here = library(tmp_path, monkeypatch)
    assert not here.load()
    assert "the torch reference runs on the TEST" in caplog.text
    assert here.describe().startswith("torch reference: ")


# symbols of torch 2.10 and of the C and C++ runtimes; that of the stream is weak
ALLOWED = set((ROOT / "tests" / "abi.txt").read_text().split())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_binding_needs_only_the_stable_abi(tmp_path):
    symbols, runtimes = set(), set()
    units = [u for u in nvcc.SOURCES if u.endswith(".cpp")]
    home = Path(torch.__file__).parent
    compiling, _ = nvcc.build("nvcc", folder("cuda_ext"), ("80",)).commands(home, tmp_path)
    for command in compiling:
        if Path(command[-3]).name in units:
            subprocess.run(command, check=True)
            listed = subprocess.run(
                ["nm", "--undefined-only", command[-1]], check=True, capture_output=True, text=True
            )
            symbols |= {line.split()[-1] for line in listed.stdout.splitlines()}
            runtimes.add(cuda.runtime_version(Path(command[-1])))
    of_torch = {name for name in symbols if name.startswith(("aoti_", "torch_"))}
    assert len(of_torch) > 20
    (runtime,) = runtimes - {None}  # the driver is compared with it before the library is loaded
    assert runtime // 1000 == nvcc.major_version("nvcc")
    assert of_torch <= ALLOWED, sorted(of_torch - ALLOWED)
    # nothing of torch's C++, whose names change with every version
    assert not [n for n in symbols if "c10" in n or ("N2at" in n) or "N5torch3jit" in n]


LOADED = """
    import ctypes, sys, torch
    from pathlib import Path
    from torch._subclasses.fake_tensor import FakeTensorMode
    from dtq.kernels import CUDA
    CUDA.opened = CUDA.open(Path(sys.argv[1]))
    assert CUDA.opened.dtq_cuda_has_stream() == int(torch.version.cuda is not None)
    print(CUDA.detail(CUDA.opened))
    o = torch.ops.dtq
    with FakeTensorMode():
        x = torch.empty(5, 64, device="cuda", dtype=torch.bfloat16)
        codes, scale = o.quantize_rows(x, None, 64, None)
        weight = torch.empty(7, 64, device="cuda", dtype=torch.int8)
        y = o.w8a8_linear(codes, scale, weight, torch.empty(7, 1, device="cuda"), None, x.dtype)
        assert (y.shape, y.dtype, y.device.type) == ((5, 7), x.dtype, "cuda")
    for name in CUDA.ops:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dtq::{name}", "CUDA"), name
    x = torch.randn(5, 64)
    torch.library.opcheck(o.quantize_rows, (x, None, 64, None))
    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        return o.quantize_rows(x, None, 64, None)[0]
    assert torch.equal(f(x), o.quantize_rows(x, None, 64, None)[0])
"""


@pytest.mark.slow
def test_a_library_that_was_built_ahead_loads_without_a_gpu():
    if not CUDA.packaged().exists():
        pytest.skip("no library next to the package: make kernels, where nvcc is")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADED), str(CUDA.packaged())],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sm_90a" in done.stdout


# ------------------------------------------------------------------------------------- dispatching


def test_every_format_has_a_code():
    left = {type(fmt) for fmt in FORMATS.values() if format_codes.format_code(fmt) is None}
    assert left == {KQuant, HalfBlock, TwoLevelLut}  # decoded by torch


def test_the_table_of_the_dispatcher():
    h200, ada, b200 = (9, 0), (8, 9), (10, 0)
    assert gpu_dispatch.choose(h200, 1, 18432, 3072) == "small_m"
    assert gpu_dispatch.choose(h200, 16, 1152, 1152) == "small_m"
    assert gpu_dispatch.choose(h200, 256, 1152, 1152) == "float"  # 0.7 GFLOP
    assert gpu_dispatch.choose(h200, 1024, 1152, 1152) == "float"  # 2.7
    assert gpu_dispatch.choose(h200, 4096, 3072, 3072) == "int8"
    assert gpu_dispatch.choose(h200, 1024, 1152, 4608) == "int8"
    assert gpu_dispatch.choose(ada, 17, 1152, 1152, "NVIDIA GeForce RTX 4090") == "int8"
    assert gpu_dispatch.choose(ada, 17, 1152, 1152, "NVIDIA L40S") == "float"
    assert gpu_dispatch.choose((8, 6), 256, 1152, 1152, "NVIDIA RTX A6000") == "int8"  # 0.7
    assert gpu_dispatch.choose(b200, 1024, 1152, 1152) == "float"
    assert gpu_dispatch.choose((12, 1), 256, 1152, 1152, "NVIDIA GeForce RTX 5090") == "int8"
    assert gpu_dispatch.choose((12, 0), 256, 1152, 1152, "NVIDIA RTX PRO 6000") == "float"
    for row in gpu_dispatch.ARCHS:  # in this order with a rising number of tokens
        steps = [gpu_dispatch.choose(row.since, m, 1152, 1152, row.product) for m in range(1, 5000)]
        path = [s for i, s in enumerate(steps) if i == 0 or s != steps[i - 1]]
        last = [] if math.isinf(row.min_ops) else ["int8"]
        assert path in (["small_m", "float", *last], ["small_m", *last])


@pytest.mark.parametrize("capability", [(10, 0), (10, 1), (10, 3), (11, 0)])
def test_gpus_whose_int8_is_slow_multiply_in_float(capability):
    assert gpu_dispatch.choose(capability, 8192, 12288, 12288) == "float"
    text = gpu_dispatch.explanation(capability, 1152, 1152)
    assert "then int8" not in text
    assert gpu_dispatch.arch(capability).source in text


def test_a_gpu_has_the_row_of_its_product(monkeypatch):
    names = ["NVIDIA GeForce RTX 4090", "NVIDIA L4"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
    monkeypatch.setattr(CUDA, "load", lambda: True)
    assert gpu_dispatch._limits(0) == (16, 0)
    assert gpu_dispatch._limits(1) == (16, 1.2e9)
    problem = LinearProblem(FORMATS["int8-row"], ACTIVATION_FORMATS["int8-row"])
    text = pick(problem).by_shape(problem, (1152, 1152))
    assert text.count("sm_89: ") == 2
    assert "decoded to float below 453 tokens" in text


def test_a_weight_without_a_decoder_is_decoded_once(monkeypatch):
    problem = LinearProblem(FORMATS["lut4-2l-g16"], ACTIVATION_FORMATS["int8-row"])
    assert pick(problem).name == "w4a8-expanded"
    monkeypatch.setattr(cuda, "gpus", lambda: [((9, 0), "NVIDIA H200")])
    text = pick(problem).by_shape(problem, (1152, 1152))
    assert text == "sm_90: decoded to float below 1131 tokens, then int8"
    assert gpu_dispatch.explanation((8, 9), 1152, 1152, "GeForce", packed=False) == (
        "decoded to float below 17 tokens, then int8"
    )
    monkeypatch.setattr(gpu_dispatch, "path_for", lambda x, n: "small_m")
    seen = []

    class Ops:
        def __getattr__(self, name):
            return lambda *given: seen.append(name)

    monkeypatch.setattr(int8_gemm, "ops", Ops())
    for name in ("lut4-2l-g16", "int4-2l-g64"):
        fmt, w = FORMATS[name], torch.randn(64, 128)
        given = LinearProblem(fmt, ACTIVATION_FORMATS["int8-row"])
        parts = fmt.pack(w, fmt.compute_qparams(w))
        pick(given).call(given, torch.randn(3, 128).bfloat16(), parts, None)
    assert seen == ["cached_linear", "weight_linear"]


def test_the_dispatcher_and_the_kernels_agree_on_small_m():
    text = (folder("cuda_ext") / "launch_rows.h").read_text()
    assert f"kSmallMTokens = {gpu_dispatch.ARCHS[0].small_m};" in text


def test_off_the_gpu_the_path_is_int8():
    assert gpu_dispatch.path_for(torch.ones(1, 64, dtype=torch.bfloat16), 64) == "int8"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The dispatcher treats the CPU as an H200."""
    monkeypatch.setattr(gpu_dispatch, "on_gpu", lambda x: True)
    monkeypatch.setattr(gpu_dispatch, "_limits", lambda index: (16, 3e9))


@pytest.mark.parametrize("name", ["int8-row", "int4-2l-g64"])
def test_few_tokens_are_multiplied_in_float(as_on_a_gpu, name):
    fmt, w = FORMATS[name], agreement.normal(48, 128) * 0.1
    problem = LinearProblem(fmt, ACTIVATION_FORMATS["int8-row"], 64)
    parts = fmt.pack(w, fmt.compute_qparams(w)) | {"pre_quant_scale": torch.ones(1, 128).bfloat16()}
    x = agreement.normal(3, 128).bfloat16()
    got = pick(problem).call(problem, x, parts, None)
    rotated = torch.ops.dtq.transform_rows(x, torch.ones(128).bfloat16(), None, 64, 1)
    want = (
        rotated.bfloat16()
        @ fmt.unpack({n: p for n, p in parts.items() if "pre" not in n}).bfloat16().T
    )
    assert torch.equal(got, want)
    assert pick(problem).call(problem, x.float(), parts, None).dtype == torch.float32


def smoothed(name, rotations, permuted, k=384, seed=0):
    """A problem with an input transform, and its tensors."""
    g = torch.Generator().manual_seed(seed)
    fmt, w = FORMATS[name], torch.randn(48, k, generator=g) * 0.1
    problem = LinearProblem(fmt, ACTIVATION_FORMATS["int8-row"], 64, rotations)
    signs = torch.randint(0, 2, (1, k), generator=g) * 2 - 1
    parts = fmt.pack(w, fmt.compute_qparams(w))
    parts["pre_quant_scale"] = (signs * torch.exp(torch.randn(1, k, generator=g))).bfloat16()
    if permuted:
        parts["pre_quant_perm"] = torch.randperm(k, generator=g).int().reshape(1, -1)
    return problem, parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rotations", "permuted"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("name", ["int8-row", "int4-2l-g64"])
def test_a_small_layer_is_one_product_with_a_folded_weight(
    as_on_a_gpu, name, rotations, permuted, dtype, monkeypatch
):
    problem, parts = smoothed(name, rotations, permuted)
    x, bias = agreement.normal(40, 384).to(dtype), agreement.normal(48)
    called = []
    monkeypatch.setattr(LinearCall, "transformed", lambda call: called.append(call))
    got = pick(problem).call(problem, x, parts, bias)
    assert not called
    scale, perm = parts["pre_quant_scale"].double(), parts.get("pre_quant_perm")

    def transform(rows):
        rows = rows.double() * scale
        rows = rows if perm is None else rows[:, perm.reshape(-1).long()]
        return rotate(rows, 64, rotations)

    # the exact product of the transformed input with the decoded weight
    w = problem.weight_format.unpack({n: p for n, p in parts.items() if "pre" not in n}).double()
    want = transform(x) @ w.T + bias.to(dtype).double()
    folded = w @ transform(torch.eye(384)).T
    # docs/kernels.md: half a unit of each folded weight, half a unit of the output, float32 sums
    unit = torch.finfo(dtype).eps / 2
    terms = x.double().abs() @ folded.abs().T
    bound = unit * (terms + want.abs()) * 1.01 + 384 * 2**-24 * terms
    assert ((got.double() - want).abs() <= bound).all()
    # not farther from it than with the transform at run time, which rounds input and weight
    apart = transform(x).to(dtype) @ w.to(dtype).T + bias.to(dtype)
    assert (got.double() - want).norm() < 1.1 * (apart.double() - want).norm()


def test_a_folded_weight_follows_its_transform(as_on_a_gpu):
    """Smoothing that changes between calls, as it would with a vector per timestep."""
    problem, parts = smoothed("int8-row", 1, False)
    x = agreement.normal(40, 384).bfloat16()
    one, other = parts["pre_quant_scale"], parts["pre_quant_scale"] * 2
    first = pick(problem).call(problem, x, parts, None)
    assert torch.equal(pick(problem).call(problem, x, parts, None), first)
    doubled = pick(problem).call(problem, x, parts | {"pre_quant_scale": other}, None)
    assert torch.equal(doubled, first * 2)
    assert torch.equal(pick(problem).call(problem, x, parts, None), first)
    one *= 2  # in place
    assert torch.equal(pick(problem).call(problem, x, parts, None), doubled)
    unrotated = LinearProblem(problem.weight_format, problem.activation_format)
    again = pick(unrotated).call(unrotated, x, parts, None)
    assert not torch.equal(again, doubled)


@pytest.mark.parametrize("name", ["int4-g64", "int8-asym-g128"])
def test_integers_with_float_scales_are_multiplied_decoded(as_on_a_gpu, name, monkeypatch):
    fmt, w = FORMATS[name], agreement.normal(48, 256) * 0.1
    problem = LinearProblem(fmt, ACTIVATION_FORMATS["int8-row"])
    parts = fmt.pack(w, fmt.compute_qparams(w))
    x, bias = agreement.normal(20, 256), agreement.normal(48)
    there = pick(problem).call(problem, x, parts, bias)
    monkeypatch.undo()
    here = pick(problem).call(problem, x, parts, bias)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-46", "mxfp4"])
def test_fp4_is_multiplied_where_the_tensor_cores_do(name, monkeypatch):
    fmt, w = FORMATS[name], agreement.normal(48, 384) * 0.1
    problem = LinearProblem(fmt, ACTIVATION_FORMATS[name.removesuffix("-46")], 64, 2)
    parts = fmt.pack(w, fmt.compute_qparams(w)) | {
        "pre_quant_scale": (torch.rand(1, 384) + 0.5).bfloat16(),
        "pre_quant_perm": torch.randperm(384, dtype=torch.int32).reshape(1, -1),
    }
    x, bias = agreement.normal(20, 384), agreement.normal(48)
    decoded = pick(problem).call(problem, x, parts, bias)
    low, up = agreement.normal(20, 16), agreement.normal(48, 16)
    asked = []
    monkeypatch.setattr(gpu_dispatch, "on_gpu", lambda x: True)
    monkeypatch.setattr(gpu_dispatch, "_has_fp4", lambda index: asked.append(index) or True)
    got = pick(problem).call(problem, x, parts, bias)
    assert asked
    torch.testing.assert_close(got, decoded, rtol=1e-4, atol=1e-4)
    epilogue = Epilogue(gelu=True, branch=(low, up))
    got = pick(problem).with_epilogue(LinearCall(problem, x, parts, bias), epilogue)
    want = torch.nn.functional.gelu(decoded + low @ up.T, approximate="tanh")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    asked.clear()  # a K that its kernel does not support is decoded
    w = w[:, :96] if name != "mxfp4" else w[:, :320]
    narrow = LinearProblem(fmt, problem.activation_format)
    parts = fmt.pack(w, fmt.compute_qparams(w))
    call = LinearCall(narrow, x[:, : w.shape[1]], parts, bias)
    assert pick(narrow).with_epilogue(call, Epilogue()) is None
    assert pick(narrow).call(narrow, x[:, : w.shape[1]], parts, bias).shape == (20, 48)
    assert not asked


@pytest.mark.parametrize(
    ("capability", "archs", "has"),
    [
        ((12, 0), "sm_80 sm_90a sm_120f and PTX", True),
        ((12, 1), "sm_120f", True),
        ((12, 0), "sm_120a", True),
        ((12, 1), "sm_120a and PTX", False),
        ((12, 0), "sm_80 and PTX", False),
        ((10, 0), "sm_100 sm_120f", False),
    ],
)
def test_fp4_products_need_their_machine_code(capability, archs, has, monkeypatch):
    class Library:
        def dtq_cuda_archs(self):
            return archs.encode()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    monkeypatch.setattr(CUDA, "load", lambda: True)
    monkeypatch.setattr(CUDA, "opened", Library())
    assert gpu_dispatch._has_fp4(0) == has


def test_int8_can_be_kept_at_every_size(as_on_a_gpu, monkeypatch):
    assert gpu_dispatch.path_for(torch.ones(40, 64).bfloat16(), 64) == "float"
    monkeypatch.setattr(gpu_dispatch, "INT8_ONLY", True)
    assert gpu_dispatch.path_for(torch.ones(40, 64).bfloat16(), 64) == "int8"


def test_a_decoded_weight_is_cached_until_its_packed_tensors_change():
    fmt, w = FORMATS["int4-2l-g64"], agreement.normal(48, 128) * 0.1
    parts = fmt.pack(w, fmt.compute_qparams(w))
    x, names = agreement.normal(5, 128), list(parts)

    def run():
        weight = list(parts.values()), names, fmt.name
        return torch.ops.dtq.cached_linear(x, *weight, None, None, 1, 1, None)

    before = WEIGHT_CACHE.nbytes
    first = run()
    assert WEIGHT_CACHE.nbytes == before + 48 * 128 * 4
    assert torch.equal(run(), first)
    parts["weight"].zero_()
    assert not torch.equal(run(), first)
    parts.clear()
    assert WEIGHT_CACHE.nbytes == before


def test_compiled_layers_ask_the_dispatcher_once(as_on_a_gpu):
    fmt, w = FORMATS["int8-row"], agreement.normal(48, 128) * 0.1
    problem = LinearProblem(fmt, ACTIVATION_FORMATS["int8-row"])
    parts = fmt.pack(w, fmt.compute_qparams(w))
    x = agreement.normal(40, 128).bfloat16()
    torch._dynamo.reset()
    whole = torch.compile(
        lambda x: pick(problem).call(problem, x, parts, None), fullgraph=True, backend="eager"
    )
    assert torch.equal(whole(x), pick(problem).call(problem, x, parts, None))


def test_inspection_names_what_a_gpu_would_run():
    lines = explain(
        LinearProblem(FORMATS["int4-2l-g64"], ACTIVATION_FORMATS["int8-row"], 64), (1152, 1152)
    )
    assert lines[0].startswith("w8a8: weights are int4-2l-g64")
    assert any(line.startswith("on the CPU: ") for line in lines)
    (gpu,) = [line for line in lines if line.startswith("on the GPU: ")]
    assert CUDA.describe() in gpu
    assert "up to 16 tokens the packed weight times float" in gpu
    lines = explain(LinearProblem(FORMATS["nvfp4"], ACTIVATION_FORMATS["none"]), (1152, 1152))
    assert "weight-only: used" in lines
    lines = explain(LinearProblem(FORMATS["nvfp4"], ACTIVATION_FORMATS["nvfp4"]), (1152, 1152))
    assert "fp4: used" in lines
    assert lines[-1].endswith("(sm_120: FP4 products; other GPUs decode the weight to float)")
    lines = explain(LinearProblem(FORMATS["mxfp4"], ACTIVATION_FORMATS["mxfp4"]), (1152, 96))
    assert lines[-1].endswith("(sm_120: no FP4 products, K 96 is not a multiple of 128)")
    lines = explain(LinearProblem(FORMATS["nvfp4"], ACTIVATION_FORMATS["mxfp4"]), (1152, 1152))
    assert "fp4: activations are mxfp4, not nvfp4" in lines
    assert "float-product: used" in lines
    lines = explain(
        LinearProblem(FORMATS["int4-g64"], ACTIVATION_FORMATS["int8-row"]), (1152, 1152)
    )
    assert lines[-1] == f"on the GPU: {CUDA.describe()} (as float-product)"
