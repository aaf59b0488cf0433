# SPDX-License-Identifier: Apache-2.0
"""Static timing of the CUDA kernels: estimates from the machine code, see tests/sass.py. Nothing is measured.

``pytest -s tests/kernels/test_cuda_timing.py`` prints the values; docs/kernels.md has them. Every call
is bfloat16 with whole tiles: 4096 tokens, 3072 columns and rows, a bias.
"""

from __future__ import annotations

import functools
import shutil

import pytest
import sass
from launch_structs import POINTER, Gemm, GemmArgs, RowPlan, Rows, SmallM, SmallMPlan, Weight

from dtq.kernels import gpu_fusion

BFLOAT16 = 1
TENSOR_MAPS = bytes(256)  # of WgmmaArgs, before its GemmArgs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc"),
    pytest.mark.skipif(not sass.tool(), reason="needs cuobjdump"),
]


@pytest.fixture(scope="module")
def kernels(shared_folder):
    """Kernels of a source file for an architecture, compiled once."""
    return functools.cache(lambda source, arch: sass.kernels(source, arch, shared_folder))


def gemm(**changes):
    g = Gemm(tokens=4096, rows=3072, columns=3072, group=64, arch=90, sms=132)
    for name in (
        "x_q",
        "row_scale",
        "weight",
        "groups",
        "codebooks",
        "weight_scale",
        "bias",
        "out",
    ):
        setattr(g, name, POINTER)
    g.bias_type = g.out_type = g.lowrank_type = BFLOAT16
    for name, value in changes.items():
        setattr(g, name, value)
    return GemmArgs(g, POINTER, 48, 6, 1, 48, False)


GATE = {"gate": POINTER, "residual": POINTER, "gate_tokens": 4096}
PLAIN, FUSED = 0, 1  # dtq::Finish


def hopper(kernels, source, tokens, finish, thread=128, **changes):
    """A warp of the wgmma kernel; thread 128 is in the first consumer warpgroup."""
    kernel = sass.find(kernels(source, "90a"), rf"gemm_wgmma.*ELi{tokens}E.*FinishE{finish}E")
    params = TENSOR_MAPS + bytes(gemm(**changes))
    return kernel, sass.run(kernel, params, thread=thread, threads=384, align=128)


# After the last product, until the warp ends: (kernel, call, cycles a tile at most)
EPILOGUES = {
    "plain": (PLAIN, {}, 1_500),
    "gelu": (FUSED, {"gelu": True}, 8_000),
    "gate and residual": (FUSED, GATE, 4_000),
    "gate and residual, many images": (FUSED, GATE | {"gate_tokens": 64}, 4_000),
    "gelu, gate and residual": (FUSED, GATE | {"gelu": True}, 8_000),
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("source", ["gemm_int8.cu", "gemm_two_level.cu"])
def test_the_epilogue_on_hopper(kernels, source, name):
    finish, changes, bound = EPILOGUES[name]
    kernel, walk = hopper(kernels, source, 256, finish, **changes)
    assert walk.count("IGMMA") == 4 * 24  # the whole main loop: 32 columns each
    part = walk.between("WARPGROUP.DEPBAR", "EXIT")
    print(
        f"\n{source} {name}: {part.instructions} instructions, {part.cycles} cycles a tile, "
        f"{part.count('MUFU')} MUFU, {kernel.registers} registers"
    )
    assert part.count("STG.E.128") == 16  # 256 tokens x 64 rows of 128 threads, 16 bytes each
    assert part.cycles <= bound
    after = part.between("BAR.SYNC", "EXIT", first=True)  # both warpgroups are done with the ring
    assert not after.count("F2F\\."), "conversions one at a time"
    assert not after.count("BSSY"), "branches in which lanes may differ"


# Between the last product of a tile and the first of the next: (has GELU, cycles a tile at most)
BETWEEN_TILES = {
    ("gemm_int8.cu", "plain"): (0, 1_900),
    ("gemm_int8.cu", "gelu"): (1, 4_400),
    ("gemm_two_level.cu", "plain"): (0, 2_300),
    ("gemm_two_level.cu", "gelu"): (1, 4_600),
}
MULTIPROCESSORS = 132


def persistent(kernels, source, has_gelu, thread):
    """A warp of the first block; 66 clusters have 12 x 16 tiles, the first one has three."""
    kernel = sass.find(kernels(source, "90a"), rf"gemm_persistent.*E+Lb{has_gelu}E")
    params = TENSOR_MAPS + TENSOR_MAPS[:128] + bytes(gemm(gelu=bool(has_gelu)))
    return kernel, sass.run(
        kernel, params, thread=thread, threads=384, grid=MULTIPROCESSORS, align=128
    )


@pytest.mark.parametrize(("source", "name"), BETWEEN_TILES)
def test_what_persistent_blocks_do_not_hide(kernels, source, name):
    """From the second tile to the third, in a consumer: no product runs in between."""
    has_gelu, bound = BETWEEN_TILES[source, name]
    kernel, walk = persistent(kernels, source, has_gelu, thread=128)
    of_tile = 4 * 24
    products = walk.starts("IGMMA")
    assert len(products) == 3 * of_tile
    part = walk.part(products[2 * of_tile - 1], products[2 * of_tile])
    print(
        f"\n{source} {name}: {part.instructions} instructions, {part.cycles} cycles between the "
        f"products of two tiles, {kernel.registers} registers"
    )
    # commits of chunks; a store is in a loop over lanes, which the walk may repeat
    assert part.count("UTMACMDFLUSH") == (4 if source == "gemm_int8.cu" else 2)
    assert part.count("UTMASTG")
    assert not part.count("STG"), "outputs are stored by bulk copies"
    assert part.cycles <= bound


@pytest.mark.parametrize("thread", [0, 128], ids=["producer", "consumer"])
@pytest.mark.parametrize("kernel", ["persistent", "plain", "fused"])
def test_nothing_is_read_before_the_previous_kernel_has_ended(kernels, kernel, thread):
    """In the machine code, where neither compiler has moved a load: ACQBULK is griddepcontrol.wait."""
    if kernel == "persistent":
        _, walk = persistent(kernels, "gemm_int8.cu", 0, thread)
    else:
        finish, changes = (PLAIN, {}) if kernel == "plain" else (FUSED, GATE)
        _, walk = hopper(kernels, "gemm_int8.cu", 256, finish, thread, **changes)
    accesses = walk.starts(r"^(@!?U?P\d )?(LD|ST|LDG|STG|UTMALDG|UTMASTG|RED|ATOM)\b")
    assert walk.count("ACQBULK") == 1
    assert walk.starts("ACQBULK")[0] < accesses[0]


def mma(kernels, source, arch, has_epilogue=0, **changes):
    kernel = sass.find(kernels(source, arch), rf"gemm_mma.*ELi128ELi128E.*Lb1EEELb{has_epilogue}E")
    return kernel, sass.run(kernel, bytes(gemm(**changes)), threads=256)


# (instructions, cycles) of a step of 64 columns at most
MMA = {
    ("gemm_int8.cu", "80"): (115, 450),
    ("gemm_two_level.cu", "80"): (310, 810),
    ("gemm_two_level.cu", "89"): (310, 810),
    ("gemm_table.cu", "80"): (305, 950),
}


@pytest.mark.parametrize(("source", "arch"), MMA)
def test_the_main_loop_with_mma_sync(kernels, source, arch):
    instructions, cycles = MMA[source, arch]
    kernel, walk = mma(kernels, source, arch)
    assert walk.count("IMMA") == 32 * 48
    steps = walk.starts("BAR.SYNC")
    step = walk.part(steps[-9], steps[-1])
    print(
        f"\n{source} sm_{arch}: {step.instructions / 8:.0f} instructions and {step.cycles / 8:.0f} "
        f"cycles a step, {step.count('IMMA') // 8} IMMA, {kernel.registers} registers"
    )
    assert step.instructions / 8 <= instructions
    assert step.cycles / 8 <= cycles
    assert sass.blocks(kernel, 256, shared=48 * 1024) == 2


# After the last product: (kernel with an epilogue, call, cycles a tile at most)
MMA_EPILOGUES = {
    "plain": (0, {}, 2_400),
    "gelu": (1, {"gelu": True}, 3_300),
    "gate and residual": (1, GATE, 3_400),
    "gelu, gate and residual": (1, GATE | {"gelu": True}, 4_900),
}


@pytest.mark.parametrize("name", MMA_EPILOGUES)
@pytest.mark.parametrize("source", ["gemm_int8.cu", "gemm_two_level.cu"])
def test_the_epilogue_with_mma_sync(kernels, source, name):
    has_epilogue, changes, bound = MMA_EPILOGUES[name]
    kernel, walk = mma(kernels, source, "80", has_epilogue, **changes)
    part = walk.between("IMMA", "EXIT")
    print(
        f"\n{source} sm_80 {name}: {part.instructions} instructions, {part.cycles} cycles a tile, "
        f"{kernel.registers} registers"
    )
    assert part.count("STG") == 32  # 64 outputs of a thread
    assert not part.count("F2F\\.")
    assert part.cycles <= bound


FUSIONS = {"gelu": {"gelu": True}, "gate": GATE}
"""Patterns of the table of fusions: the calls."""
SPECIAL_FUNCTIONS = 256 * 128 * 2 // 16
"""Cycles for the ex2 and rcp of GELU in a tile of sm_90, whose four schedulers do four each."""
GELU_WALK = 86
"""Cycles that GELU adds to one warp's walk on sm_90, for 1024 outputs. The special functions of all
warps take longer, so the table has those."""


@pytest.mark.parametrize("pattern", FUSIONS)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_the_table_of_fusions(kernels, capability, pattern):
    """Its cycles are those of the machine code, and so is its decision."""
    calls = ((PLAIN, {}), (FUSED, FUSIONS[pattern]))
    if capability == (9, 0):
        walks = [hopper(kernels, "gemm_int8.cu", 256, kernel, **call)[1] for kernel, call in calls]
        last_product, outputs = "WARPGROUP.DEPBAR", 256 * 128
    else:
        walks = [
            mma(kernels, "gemm_two_level.cu", "80", kernel, **call)[1] for kernel, call in calls
        ]
        last_product, outputs = "IMMA", 128 * 128
    plain, fused = (walk.between(last_product, "EXIT").cycles for walk in walks)
    if (capability, pattern) == ((9, 0), "gelu"):
        assert (fused - plain) * 1024 / outputs == pytest.approx(GELU_WALK, rel=0.15)
        assert fused < SPECIAL_FUNCTIONS
        fused = SPECIAL_FUNCTIONS
    extra = (fused - plain) * 1024 / outputs
    row = gpu_fusion.fusion(pattern, capability)
    print(f"\n{pattern}: {extra:.0f} cycles more for 1024 outputs, {row.apart:.0f} apart")
    assert extra == pytest.approx(row.fused, rel=0.15)
    assert (extra < row.apart) == row.is_faster


def rows(block):
    """LayerNorm, modulation, int8."""
    r = Rows(rows=4096, columns=3072, stride=3072, prologue=2, modulate_stride=3072)
    r.rows_per_modulate, r.hadamard_block, r.num_rotations = 4096, block, 1
    r.output, r.qmax, r.out_stride, r.width = 0, 127, 3072, 3072
    r.type = r.modulate_type = BFLOAT16
    for name in ("x", "modulate_scale", "modulate_shift", "out", "scale"):
        setattr(r, name, POINTER)
    p = RowPlan(r, block**-0.5, True, True, True, True, 1, -1, 1 / 127)
    p.modulate_multiplier, p.modulate_shift = 2**31 + 1, 12  # for images of 2^12 rows
    p.x_pitch = p.modulate_pitch = 6144
    p.out_pitch, p.inverse_columns = 3072, 1 / 3072
    return p


VALUES_OF_A_THREAD = 32
ROWS = {1: 26, 64: 35}
"""Hadamard block: instructions a value at most."""


@pytest.mark.parametrize("block", ROWS)
def test_norm_modulate_and_quantize(kernels, block):
    # the prologue is LayerNorm, with vectors of the type of x, which is bfloat16; to int8
    kind = "PrologueE2E.*ModulationE1E.*FloatE1E.*OutputE0E"
    kernel = sass.find(kernels("rows.cu", "90a"), f"rows_register_kernel.*{kind}")
    walk = sass.run(kernel, bytes(rows(block)), threads=96)
    each = walk.instructions / VALUES_OF_A_THREAD
    print(
        f"\nnorm, modulate, int8, Hadamard block {block}: {each:.1f} instructions a value, "
        f"{kernel.registers} registers"
    )
    assert each <= ROWS[block]


def small_m(columns, encoding, scale_type, zero, bits):
    """Integers with groups of 64 columns, 8-bit ones with a scale a row; bfloat16, one token."""
    groups = columns // 64 if bits == 4 else 1
    w = Weight(encoding=encoding, bits=bits, rows=18_432, columns=columns, groups=groups)
    w.scale_type, w.offset = scale_type, 8 if bits == 4 else 0
    w.weight = w.scale = w.group_bytes = POINTER
    w.zero = POINTER if zero else None
    p = SmallMPlan(f=SmallM(w, POINTER, BFLOAT16, 1, columns, POINTER, POINTER), aligned_x=True)
    p.weight.w, p.weight.row_bytes = w, columns * bits // 8
    p.weight.group, p.weight.shift = (64, 6) if bits == 4 else (columns, 31)
    p.weight.aligned = True
    return p


AFFINE, TWO_LEVEL = 0, 5
SCALE_FLOAT32, SCALE_BFLOAT16 = 1, 2
FEW_TOKENS = {
    "int4-g64": ("8Int4Bf16ILb0E", AFFINE, SCALE_BFLOAT16, False, 4, 4),
    "int4-asym-g64": ("8Int4Bf16ILb1E", AFFINE, SCALE_BFLOAT16, True, 4, 4),
    "int4-g64, float32 scales": ("9Int4FloatILb0E", AFFINE, SCALE_FLOAT32, False, 4, 6),
    "int4-2l-g64": ("12Int4TwoLevel", TWO_LEVEL, SCALE_FLOAT32, False, 4, 6),
    "int8-row": ("9Int8CodesILb0E.*ScaleTypeE1E", AFFINE, SCALE_FLOAT32, False, 8, 6),
}
"""Format: the kernel, its weight with the number of bits, and instructions a weight at most."""


@pytest.mark.parametrize("name", FEW_TOKENS)
def test_few_tokens_with_integers(kernels, name):
    """By the difference of two lengths of a row: the loop alone."""
    codes, *weight, bound = FEW_TOKENS[name]
    # up to 8 tokens
    kernel = sass.find(kernels("weights.cu", "90a"), f"small_m_integers_kernel.*{codes}.*Li1E")
    short, long = (sass.run(kernel, bytes(small_m(k, *weight)), threads=128) for k in (3072, 6144))
    weights = 3072 * 16 / 128  # more of a thread: 16 rows of a block, shared by 128 threads
    each = (long.instructions - short.instructions) / weights
    print(f"\nfew tokens, {name}: {each:.2f} instructions a weight, {kernel.registers} registers")
    assert long.count("HMMA") - short.count("HMMA") == weights / 8  # none for tokens 8 to 15
    assert each <= bound
