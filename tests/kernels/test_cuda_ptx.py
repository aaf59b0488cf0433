# SPDX-License-Identifier: Apache-2.0
"""The asm statements of the CUDA kernels, executed on a CPU: their PTX, translated for the emulator."""

from __future__ import annotations

import re
import shutil

import golden
import pytest

SOURCE = (golden.FOLDER / "arch.cuh").read_text()
ARCHS = {"90a": 9, "120f": 12}
NOT_EXECUTED = {"trap;"}
"""It ends the program, and no kernel needs it for a result."""


def needs_compilers(test):
    for program in ("nvcc", "g++"):
        test = pytest.mark.skipif(not shutil.which(program), reason=f"needs {program}")(test)
    return pytest.mark.slow(test)


def device_functions() -> dict[str, str]:
    """The functions of arch.cuh that run on a GPU, and their bodies, up to the next function."""
    device = SOURCE[SOURCE.index("DTQ_DEV int tid()") : SOURCE.index("-- host\n")]
    device += (golden.FOLDER / "wgmma.inc").read_text()
    pieces = re.split(r"DTQ_DEV [\w ]+?(\w+)\(", device)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return {
        arch: golden.translated(tmp_path_factory.mktemp(arch), shutil.which("nvcc"), arch)
        for arch in ARCHS
    }


def kernels_of(library, arch):
    """Those whose instructions the architecture has."""
    return [name for name, kernel in library.kernels.items() if kernel.major in (0, ARCHS[arch])]


def test_every_function_of_arch_has_a_kernel():
    functions = device_functions()
    assert len(functions) > 50
    kernels = golden.SOURCE.read_text().split("DTQ_TRANSLATED)", 2)[2]
    called = set(re.findall(r"\b(\w+)(?:<[^<>;()]*>)?\(", kernels))
    assert set(functions) - called == {"trap", "shared_address"}, (
        "no kernel in golden.cu calls them"
    )
    assert any("asm" in body for body in functions.values())


def test_statements_are_recognized():
    statements = golden.asm_statements()
    assert len(statements) > 40
    assert "mov.u32 %0, %%cluster_ctarank;" in statements
    assert golden.is_statement("mov.u32 %r5, %cluster_ctarank;", "mov.u32 %0, %%cluster_ctarank;")
    template = next(s for s in statements if s.startswith("cp.async.cg"))
    assert golden.is_statement("cp.async.cg.shared.global [%r1], [%rd2], 16, %r3;", template)
    assert not golden.is_statement("cp.async.cg.shared.global [%r1], [%rd2], 8, %r3;", template)
    assert not golden.is_statement("cp.async.cg.shared.global [%r1], [%rd2], 16;", template)


@needs_compilers
@pytest.mark.parametrize("arch", ARCHS)
def test_translated_ptx_gives_the_bits_of_the_emulator(libraries, arch):
    library = libraries[arch]
    names = kernels_of(library, arch)
    assert {n: library.digest(n) for n in names} == {n: golden.EMULATOR[n] for n in names}


@needs_compilers
def test_every_asm_statement_of_arch_is_executed(libraries):
    executed = set()
    for arch, library in libraries.items():
        for name in kernels_of(library, arch):
            library.run(name, 0)
        executed |= {text for text, ran in library.statements().items() if ran}
    missing = [
        template
        for template in golden.asm_statements()
        if not any(golden.is_statement(text, template) for text in executed)
    ]
    assert set(missing) == NOT_EXECUTED


MMA = "{%4, %5, %6, %7}"
FAULTS = {
    ("90a", 1): (
        ("cp_async_commit", "cp.async.commit_group;", "", "cp_async"),
        ("stg_if", "@p", "@!p", "conditions"),
        ("exp2_approximate", "ex2", "rcp", "approximations"),
        ("stmatrix_x4_trans", "{%1, %2, %3, %4}", "{%1, %2, %4, %3}", "stmatrix"),
        ("fma_bf16x2", "%1, %2, %3", "%3, %2, %1", "floats"),
        ("sync_named", "%0, %1", "%1, %0", "named_barriers"),
        ("mma_s8", MMA, "{%4, %6, %5, %7}", "mma_s8"),
        ("mma_bf16", "{%8, %9}", "{%9, %8}", "mma_halves"),
        ("ldmatrix_x4_trans", ".trans", "", "matrices"),
        ("byte_perm", "%1, %2", "%2, %1", "integers"),
        ("floats_to_bf16x2", "%1, %2", "%2, %1", "conversions"),
        ("wgmma_s8<64>(int32_t (&d)[32], uint64_t a", "%32, %33, p", "%33, %32, p", "wgmma_64 wgmma_groups"),
        ("wgmma_s8<128>(int32_t (&d)[64], const", "%64, %65", "%65, %64", "wgmma_128"),
        ("wgmma_s8<256>(int32_t (&d)[128], uint64_t a", "setp.ne", "setp.eq", "wgmma_256"),
        ("mbarrier_wait", "[%1], %2;", "[%1], 0;", "mbarrier"),
        ("mbarrier_arrive_at", "remote, %0, %1", "remote, %1, %0", "cluster"),
        ("wgmma_wait", "%0;", "1;", "wgmma_64 wgmma_128 wgmma_256 wgmma_groups"),
        ("void more_registers", ".inc.", ".dec.", "registers"),
        ("store_box", "{%2, %3}", "{%3, %2}", "box_stores"),
        ("wait_for_previous_kernel", "griddepcontrol.wait;", "", "dependent"),
        ("load_box", "bytes\"\n        \" [%0], [%1, {%3, %4}]", "bytes\"\n        \" [%0], [%1, {%4, %3}]",
         "boxes_64 boxes_128"),
    ),
    ("90a", 2): (
        ("ld_global_if", "@p", "@!p", "conditions"),
        ("max_magnitude", "%1, size", "%1, %1", "floats"),
        ("mma_f16", MMA, "{%5, %4, %7, %6}", "mma_halves"),
        ("ldmatrix_x4", "{%0, %1, %2, %3}", "{%0, %2, %1, %3}", "matrices"),
        ("float_to_f16", "cvt.rn.f16.f32 %0", "cvt.rn.bf16.f32 %0", "conversions"),
        ("wgmma_s8<64>(int32_t (&d)[32], const", "%32, %33, %34", "%34, %33, %32", "wgmma_64"),
        ("fence_proxy_async", "fence.proxy.async.shared::cta;", "", "wgmma_128 wgmma_256 wgmma_groups"),
        ("bulk_wait_read", "%0;", "1;", "box_stores"),
        ("load_box", "cluster [%0], [%1, {%3, %4}]", "cluster [%0], [%1, {%4, %3}]", "cluster"),
    ),
    ("120f", 1): (
        ("mma_fp4", "{%10}, {0, 0}, \"\n        \"{%11}", "{%11}, {0, 0}, \"\n        \"{%10}", "mma_fp4"),
    ),
}  # fmt: skip
"""Faults that are planted together: place in arch.cuh or wgmma.inc, old and new text, what differs."""


@needs_compilers
@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_a_fault_in_an_asm_statement_is_found(tmp_path, case):
    arch, _ = case
    for folder in (golden.FOLDER, golden.FOLDER.parent / "common_ext"):
        shutil.copytree(folder, tmp_path / folder.name)
    expected = set()
    for place, old, new, kernels in FAULTS[case]:
        name = "wgmma.inc" if "wgmma_s8" in place else "arch.cuh"
        path = tmp_path / "cuda_ext" / name
        text = path.read_text()
        start = text.index(f"{place}" if "(" in place or " " in place else f" {place}(")
        at = text.index(old, start)
        assert "DTQ_DEV" not in text[start:at], f"{old} is not in {place}"
        path.write_text(text[:at] + new + text[at + len(old) :])
        expected |= set(kernels.split())
    source = tmp_path / "cuda_ext" / "tests" / "golden.cu"
    library = golden.translated(tmp_path, shutil.which("nvcc"), arch, source)
    assert {n for n in kernels_of(library, arch) if differs(library, n)} == expected


def differs(library, name):
    try:
        return library.digest(name) != golden.EMULATOR[name]
    except AssertionError:  # the emulator has found an error
        return True
