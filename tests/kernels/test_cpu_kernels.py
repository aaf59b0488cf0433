# SPDX-License-Identifier: Apache-2.0
"""Compiled CPU kernels: bit-identical to the reference; built once, or refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.formats.integer import TwoLevelInt
from dtq.kernels import CPU, LinearProblem, explain, ops_quantize
from dtq.kernels.compile import gcc
from dtq.kernels.table import pick
from dtq.nn import QuantLinear
from dtq.plan.layers import LayerSpec

ROOT = Path(__file__).parent.parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# around one block of 16 tokens, a group of three blocks, and the small M that is not rearranged
TOKENS = [1, 2, 5, 8, 9, 16, 17, 48, 118]
compiled = torch.ops.dtq
reference = torch.ops.dtq_reference


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape, seed=0, low=-127):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, 128, shape, dtype=torch.int8, generator=g)


def same(got, want):
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_rows_gives_the_bits_of_the_reference(isa, dtype):
    for m, k in [(1, 64), (5, 1152), (17, 4160), (3, 96)]:
        x = (random(m, k) * 3).to(dtype)
        x[0, : k // 2] = 0
        pre = (torch.rand(k, generator=torch.Generator().manual_seed(1)) - 0.5).to(torch.bfloat16)
        for block in (1, 2, 4, 8, 16, 32, 64, 128):
            if k % block:
                continue
            for scale in (None, torch.tensor([0.02])):
                for levels in (127, 31, 7):
                    for p in (None, pre):
                        args = (x, p, block, scale, levels)
                        got = compiled.quantize_rows(*args)
                        assert same(got, reference.quantize_rows(*args)), (
                            m,
                            k,
                            block,
                            scale,
                            levels,
                        )


def test_norm_and_quantize_give_the_bits_of_the_reference(isa):
    # more than 16384 columns: the sums of several warps meet in one place
    for m, k, images in [(4, 64, 2), (6, 1152, 3), (3, 100, 1), (2, 1000, 2), (2, 17024, 1)]:
        block = next(b for b in (128, 64, 8, 4) if k % b == 0)
        x = random(m, k) * 4 + 1
        up, along = (random(images, k, seed=i) for i in (1, 2))
        pre = (random(k, seed=3) + 2).to(torch.bfloat16)
        order = torch.randperm(k, generator=torch.Generator().manual_seed(4)).int()
        for dtype in DTYPES:
            modulated = (x.to(dtype), up.to(dtype), along.to(dtype), 1e-6)
            for args in (
                (*modulated, pre, None, block, 1, None, None, 127),
                (*modulated, None, order, block, 2, torch.tensor([0.03]), None, 31),
                (x.to(dtype), None, None, 1e-5, None, None, 1, 1, None, None, 127),
            ):
                got = compiled.norm_quantize_rows(*args)
                assert same(got, reference.norm_quantize_rows(*args)), (m, k, dtype, args[6])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformed_rows_have_the_bits_of_the_reference(isa, dtype):
    scales, place = torch.tensor([0.02, 0.05, 0.01]), torch.tensor([2])
    for m, k, blocks in [
        (5, 1152, (1, 4, 16, 128)),
        (17, 4160, (64,)),
        (2, 4096, (256, 512, 2048)),
        (3, 37, (1,)),
        (1, 96, (8, 32)),
    ]:
        x = (random(m, k) * 3).to(dtype)
        pre = (random(k, seed=1)).to(torch.bfloat16)
        order = torch.randperm(k, generator=torch.Generator().manual_seed(2)).int()
        for block in blocks:
            for p in (None, pre):
                for o in (None, order):
                    for num_rotations in (1, 2):
                        args = (x, p, o, block, num_rotations)
                        got = compiled.transform_rows(*args)
                        assert same([got], [reference.transform_rows(*args)]), (
                            m,
                            k,
                            block,
                            num_rotations,
                        )
                        for scale, bin in ((None, None), (scales, None), (scales, place)):
                            args = (x, p, o, block, num_rotations, scale, bin, 127)
                            got = compiled.binned_quantize_rows(*args)
                            assert same(got, reference.binned_quantize_rows(*args)), args[3:]
    for x in (random(6, 8).T, random(8, 20)[1:5, 3:19], random(3, 8).double()):
        args = (x, None, None, 2, 2)
        assert same([compiled.transform_rows(*args)], [reference.transform_rows(*args)])
    assert compiled.transform_rows(random(0, 64), None, None, 64, 2).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_e2m1_rows_have_the_bits_of_the_reference(isa, dtype):
    for m, k, blocks in [(5, 1152, (1, 16, 128)), (17, 4160, (64,)), (3, 37, (1,))]:
        x = (random(m, k) * 10 ** random(m, 1, seed=3)).to(dtype)
        x[-1] = 0
        order = torch.randperm(k, generator=torch.Generator().manual_seed(2)).int()
        for block in blocks:
            for given in ((None, None), (random(k, seed=1).bfloat16(), order)):
                args = (x, *given, block, 1 if block == 1 else 2)
                got = compiled.e2m1_quantize_rows(*args)
                assert same(got, reference.e2m1_quantize_rows(*args)), (m, k, block)
    ties = torch.tensor([[6.0, 0.25, -0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5.0, -5.0, 5.01]])
    codes, scale = compiled.e2m1_quantize_rows(ties.to(dtype), None, None, 1, 1)
    assert codes.tolist() == [
        [12, 0, 0, 2, 2, -4, 4, 8, 8, -8, 12 if dtype != torch.bfloat16 else 8]
    ]
    assert scale.tolist() == [0.5]
    ends = torch.tensor([[1e-44, -3e-45, 0], [torch.nan, 1, 2], [torch.inf, 1, -1]])
    got, want = (
        compiled.e2m1_quantize_rows(ends, None, None, 1, 1),
        (reference.e2m1_quantize_rows(ends, None, None, 1, 1)),
    )
    assert torch.equal(got[0][0], want[0][0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "activations", [name for name, a in ACTIVATION_FORMATS.items() if a.block_format and not a.int8]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_rows_have_the_bits_of_the_reference(isa, activations, dtype):
    for m, k, block in [(5, 1152, 128), (17, 256, 1), (3, 4224, 64)]:
        x = (random(m, k) * 10 ** random(m, 1, seed=3)).to(dtype)
        x[-1], x[0, :256] = 0, 0
        order = torch.randperm(k, generator=torch.Generator().manual_seed(2)).int()
        for given in ((None, None), (random(k, seed=1).bfloat16(), order)):
            for out in (*DTYPES, torch.float64):
                args = (x, *given, block, 1 if block == 1 else 2, activations, out)
                assert same([compiled.round_rows(*args)], [reference.round_rows(*args)]), args[3:]
    ends = torch.randn(3, 256)
    ends[0, 3], ends[1, 5] = torch.nan, torch.inf
    rounded = compiled.round_rows(ends, None, None, 1, 1, activations, torch.float32)
    assert (~rounded.isfinite()).any(1).tolist() == [True, True, False]
    if ACTIVATION_FORMATS[activations].block_format != "fp8-row":
        with pytest.raises(RuntimeError):
            compiled.round_rows(torch.randn(2, 24), None, None, 1, 1, activations, torch.float32)


def test_quantize_rows_at_awkward_sizes_and_values(isa):
    for k in (1, 2, 3, 15, 37, 65):
        x = random(4, k)
        assert same(
            compiled.quantize_rows(x, None, 1, None), reference.quantize_rows(x, None, 1, None)
        )
    ties = torch.zeros(2, 64)
    ties[1, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    assert compiled.quantize_rows(ties, None, 1, None)[0][1, :4].tolist() == [127, 0, 2, -2]
    tiny = torch.full((1, 8), 1e-30)  # below the smallest scale
    huge = torch.tensor([[3e38, -1.0]])
    for x in (tiny, huge, random(6, 8).T, random(9, 12)[:, ::2], random(8, 20)[1:5, 3:19]):
        args = (x, None, 2, None)
        assert same(compiled.quantize_rows(*args), reference.quantize_rows(*args))
    assert same(
        compiled.quantize_rows(random(3, 8).double(), None, 8, None),
        reference.quantize_rows(random(3, 8).double(), None, 8, None),
    )


@pytest.mark.parametrize("m", TOKENS)
def test_w8a8_gives_the_bits_of_the_reference(isa, m):
    for n, k in [(1, 1), (33, 2), (16, 37), (31, 65), (48, 1152), (100, 4160)]:
        codes, weight = int8(m, k, low=-128), int8(n, k, seed=1, low=-128)
        rows, columns = random(m).abs(), random(n, 1).abs()
        for dtype in DTYPES:
            for bias in (None, random(n).to(dtype)):
                args = (codes, rows, weight, columns, bias, dtype)
                got, want = compiled.w8a8_linear(*args), reference.w8a8_linear(*args)
                assert same([got], [want]), (n, k, dtype)


@pytest.mark.parametrize("m", TOKENS)
def test_w4a8_gives_the_bits_of_the_reference(isa, m):
    for n, k, group in [(1, 32, 32), (33, 96, 32), (48, 1152, 64), (70, 384, 128), (9, 40, 20)]:
        codes, weight = int8(m, k), int8(n, k // 2, seed=1, low=-128)
        groups = int8(n, k // group, seed=2, low=-128)  # also those whose values wrap around
        rows, columns = random(m).abs(), random(n, 1).abs()
        for dtype in DTYPES:
            for bias in (None, random(n).to(dtype)):
                args = (codes, rows, weight, columns, groups, bias, dtype)
                got, want = compiled.w4a8_linear(*args), reference.w4a8_linear(*args)
                assert same([got], [want]), (n, k, group, dtype)


@pytest.mark.parametrize("m", TOKENS)
def test_w3a8_gives_the_bits_of_the_reference(isa, m):
    sizes = [(1, 32, 32), (33, 96, 16), (48, 1152, 64), (70, 384, 384), (9, 40, 20), (7, 200, 8)]
    for n, k, group in sizes:
        codes, weight = int8(m, k), int8(n, k * 3 // 8, seed=1, low=-128)
        groups = int8(n, k // group, seed=2, low=-128)  # also those whose values wrap around
        rows, columns = random(m).abs(), random(n, 1).abs()
        for dtype in DTYPES:
            args = (codes, rows, weight, columns, groups, random(n), dtype)
            assert same([compiled.w3a8_linear(*args)], [reference.w3a8_linear(*args)]), (
                n,
                k,
                group,
            )


@pytest.mark.parametrize("m", TOKENS)
def test_tables_give_the_bits_of_the_reference(isa, m):
    for n, k, group in [(1, 32, 32), (33, 96, 16), (48, 1152, 1152), (70, 384, 128), (9, 40, 20)]:
        codes, weight = int8(m, k), int8(n, k // 2, seed=1, low=-128)
        tables = int8(n, k // group, 16, seed=2, low=-128)
        rows, columns = random(m).abs(), random(n, 1).abs()
        for dtype in DTYPES:
            args = (codes, rows, weight, columns, tables, random(n), dtype)
            assert same([compiled.lut4a8_linear(*args)], [reference.lut4a8_linear(*args)]), (n, k)


@pytest.mark.parametrize("m", [1, 6, 8, 18, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues_give_the_bits_of_the_reference(isa, m, dtype):
    for n, k in [(1, 64), (33, 192), (48, 1152)]:
        codes, rows, columns, bias = int8(m, k), random(m).abs(), random(n, 1).abs() / 40, random(n)
        eight = compiled.w8a8_epilogue_linear, reference.w8a8_epilogue_linear
        four = compiled.w4a8_epilogue_linear, reference.w4a8_epilogue_linear
        packed = int8(n, k // 2, seed=1), columns, int8(n, k // 64, seed=2)
        for batch in (1, 2):
            if m % batch:
                continue
            gated = random(batch, n, seed=3).to(dtype), random(m, n, seed=4).to(dtype)
            mixed = gated[0].double(), gated[1]
            for gelu, (gate, rest) in [
                (True, (None, None)),
                (False, gated),
                (True, gated),
                (True, mixed),
            ]:
                epilogue = bias, gelu, gate, rest, dtype
                for op, plain in (eight, four):
                    weight = packed if op is four[0] else (int8(n, k, seed=1), columns)
                    args = (codes, rows, *weight, *epilogue)
                    got, want = op(*args), plain(*args)
                    assert same([got], [want]), (n, k, batch, gelu, gate is None)


def test_epilogues_at_the_edge(isa):
    op = compiled.w8a8_epilogue_linear
    given = int8(4, 8), random(4).abs(), int8(5, 8, seed=1), random(5, 1).abs(), random(5)
    gate, rest = random(2, 5), random(4, 5)
    with pytest.raises((RuntimeError, ValueError), match="a gate comes with a residual"):
        op(*given, True, gate, None, torch.float32)
    with pytest.raises(RuntimeError, match=r"gate \[3, 5\] for 4 tokens of 5"):
        op(*given, False, random(3, 5), rest, torch.float32)
    with pytest.raises(RuntimeError, match=r"residual \[4, 4\] for 4 tokens of 5"):
        op(*given, False, gate, random(4, 4), torch.float32)
    want = reference.w8a8_epilogue_linear(*given, True, gate, rest, torch.float64)
    assert torch.equal(op(*given, True, gate, rest, torch.float64), want)
    nothing = int8(4, 0), random(4).abs(), int8(5, 0), random(5, 1).abs(), random(5)
    want = reference.w8a8_epilogue_linear(*nothing, True, gate, rest, torch.float32)
    assert torch.equal(op(*nothing, True, gate, rest, torch.float32), want)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_give_the_bits_of_the_reference(isa, m, bits):
    for n, k, group in [(1, 32, 32), (33, 96, 32), (48, 1152, 1152), (70, 384, 128), (9, 80, 20)]:
        codes, weight = int8(m, k, low=-128), int8(n, k * bits // 8, seed=1, low=-128)
        rows, scale = random(m).abs(), random(n, k // group).abs().bfloat16()
        for zero in (None, int8(n, k // group, seed=2, low=-128)):
            for dtype in DTYPES:
                args = (codes, rows, weight, scale, zero, bits, random(n), dtype)
                got, want = compiled.group_a8_linear(*args), reference.group_a8_linear(*args)
                assert same([got], [want]), (n, k, group, dtype, zero is None)


INTEGER = [
    "int3-row", "int3-2l-g64", "int4-row", "int4-asym-row", "int4-g64", "int4-asym-g32", "int8-g64",
    "int8-asym-g128", "e2m1-row", "e1m2-row", "e3m0-row", "lut4-row", "twinlog4-row", "twinlog4z-row",
    "twinlog4c-row",
]  # fmt: skip


@pytest.mark.parametrize("name", INTEGER)
def test_integer_formats_use_an_integer_gemm(isa, name):
    fmt, problem = FORMATS[name], LinearProblem(FORMATS[name], ACTIVATION_FORMATS["int8-row"], 64)
    kernel = pick(problem)
    assert set(kernel.ops) <= set(CPU.ops)
    w, x, bias = random(50, 384), random(19, 384, seed=1), random(50, seed=2)
    parts = fmt.pack(w, fmt.compute_qparams(w))
    codes, scale = compiled.quantize_rows(x, None, 64, None)
    want = codes.double() @ fmt.unpack(parts).double().T * scale.double().unsqueeze(1)
    for tokens in (1, 8, 19):
        got = kernel.call(problem, x[:tokens], parts, bias)
        torch.testing.assert_close(got.double(), (want + bias)[:tokens], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_gives_the_bits_of_its_definition(isa, dtype):
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -90.0, 3e38, -3e38])
    for x in (torch.linspace(-12, 12, 4099), random(3, 70000) * 4, special, random(0, 3)):
        x = x.to(dtype)
        got, want = compiled.gelu(x), ops_quantize.gelu(x.float()).to(dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    x = random(40, 30).to(dtype).T[::2]
    assert torch.equal(compiled.gelu(x), ops_quantize.gelu(x.float()).to(dtype))


def test_packed_and_expanded_weights_give_the_same_bits(isa):
    codes, weight, groups = int8(20, 192), int8(40, 96, seed=1), int8(40, 3, seed=2)
    scale = random(20).abs(), random(40, 1).abs()
    packed = compiled.w4a8_linear(codes, scale[0], weight, scale[1], groups, None, torch.float32)
    expanded = TwoLevelInt.expand(weight, groups)
    plain = compiled.w8a8_linear(codes, scale[0], expanded, scale[1], None, torch.float32)
    assert torch.equal(packed, plain)


def test_nothing_to_do(isa):
    for m, n in [(0, 5), (5, 0)]:
        y = compiled.w8a8_linear(
            int8(m, 64), random(m), int8(n, 64), random(n, 1), random(n), torch.bfloat16
        )
        assert y.shape == (m, n)
    assert compiled.quantize_rows(random(0, 64), None, 64, None)[0].shape == (0, 64)


def test_extreme_outputs_round_as_torch_rounds(isa):
    codes, weight = torch.full((3, 64), 127, dtype=torch.int8), int8(16, 64)
    for unit in (1e-12, 6e-11, 1e-4, 1e-1, 1e30, torch.inf, torch.nan):
        args = (codes, torch.full((3,), unit), weight, torch.ones(16, 1), None)
        for dtype in DTYPES:
            got, want = compiled.w8a8_linear(*args, dtype), reference.w8a8_linear(*args, dtype)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_strides_and_addresses(isa):
    weight, codes = int8(50, 130)[1:34, 1:65], int8(80, 200)[3:70:2, 5:69]
    args = (codes, random(34).abs(), weight, random(33, 1).abs(), None, torch.float32)
    assert torch.equal(compiled.w8a8_linear(*args), reference.w8a8_linear(*args))


def test_threads_and_batches_change_nothing(isa):
    m, n, k = 200, 100, 256
    x, weight, groups = random(m, k).bfloat16(), int8(n, k // 2, seed=1), int8(n, k // 64, seed=2)

    def run(x):
        codes, scale = compiled.quantize_rows(x, None, 64, None)
        return compiled.w4a8_linear(
            codes, scale, weight, torch.ones(n, 1), groups, None, torch.bfloat16
        )

    before = torch.get_num_threads()
    whole = run(x)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(run(x), whole), threads
    finally:
        torch.set_num_threads(before)
    for part in (1, 3, 8, 17, 64):
        assert torch.equal(torch.cat([run(p) for p in x.split(part)]), whole), part


def test_opcheck(isa):
    x = random(5, 128).bfloat16()
    torch.library.opcheck(compiled.quantize_rows, (x, torch.ones(128).bfloat16(), 64, None))
    torch.library.opcheck(compiled.transform_rows, (x, None, torch.arange(128).int(), 64, 2))
    codes, scale = compiled.quantize_rows(x, None, 1, None)
    args = (codes, scale, int8(33, 128), torch.ones(33, 1), random(33), torch.float16)
    torch.library.opcheck(compiled.w8a8_linear, args)
    args = (codes, scale, int8(33, 64), torch.ones(33, 1), int8(33, 2), None, torch.float32)
    torch.library.opcheck(compiled.w4a8_linear, args)


def test_operands_that_do_not_fit_are_refused(isa):
    codes, one = int8(3, 64), torch.ones
    with pytest.raises(RuntimeError, match="does not fit the weight"):
        compiled.w8a8_linear(codes, one(3), int8(5, 63), one(5, 1), None, torch.float32)
    with pytest.raises(RuntimeError, match="one scale per token"):
        compiled.w8a8_linear(codes, one(2), int8(5, 64), one(5, 1), None, torch.float32)
    with pytest.raises(RuntimeError, match="bias"):
        compiled.w8a8_linear(codes, one(3), int8(5, 64), one(5, 1), one(4), torch.float32)
    with pytest.raises(RuntimeError, match="whole blocks"):
        compiled.quantize_rows(random(2, 96), None, 64, None)
    scales, bin = one(3), torch.tensor([3])
    with pytest.raises(RuntimeError, match="bin 3 of 3 static scales"):
        compiled.binned_quantize_rows(random(2, 96), None, None, 1, 1, scales, bin)
    args = random(2, 96), one(3, 96), one(3, 96), 1e-6, None, None, 1, 1, None, None
    with pytest.raises(RuntimeError, match=r"scale \[3, 96\] and shift \[3, 96\] for x \[2, 96\]"):
        compiled.norm_quantize_rows(*args)
    for channel in (-1, 96):
        order = torch.arange(96, dtype=torch.int32)
        order[5] = channel
        with pytest.raises(RuntimeError, match=f"channel {channel} in a permutation of 96"):
            compiled.transform_rows(random(2, 96), None, order, 32, 1)


def test_one_layer_compiled_by_torch(library):
    fmt = FORMATS["int4-2l-g64"]
    w = random(48, 128)
    layer = QuantLinear(128, 48, False, LayerSpec("int4-2l-g64", "int8-row", 1, False))
    layer.fill(fmt.pack(w, fmt.compute_qparams(w)))
    x = random(20, 128)
    torch._dynamo.reset()
    whole = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(whole(x), layer(x))


# -------------------------------------------------------------------------------- building

# a process that has imported the kernels and loaded none: each line of its input is a fork with other variables
FORKS = """
    import json, os, sys
    import dtq.cli
    import torch
    from dtq.kernels import CPU, LIBRARIES
    from dtq.kernels.compile import cpu
    assert not any(library.tried for library in LIBRARIES.values())
    print("imported", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        os.environ.update(job["variables"])
        for number, path in job["files"].items():
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), int(number))
        x = torch.arange(6.0).reshape(2, 3)
        codes, _ = torch.ops.dtq.quantize_rows(x, None, 1, None)  # the first use
        assert codes.tolist() == [[0, 64, 127], [76, 102, 127]], codes
        print(cpu.isa(), "|", CPU.describe(), flush=True)
        print("ended", file=sys.stderr, flush=True)
        os._exit(0)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    cache = tmp_path_factory.mktemp("imported")
    env = {k: v for k, v in os.environ.items() if not k.startswith("DTQ_")}
    server = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FORKS)], text=True,
        env=env | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout.readline() == "imported\n"
    yield server, cache
    server.communicate()
    assert server.returncode == 0


def start(forks, tmp_path, **variables):
    """A process with a cache of its own, and the files of its outputs."""
    server, _ = forks
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    files = {number: folder / number for number in ("1", "2")}
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    job = {"variables": home | variables, "files": {k: str(f) for k, f in files.items()}}
    print(json.dumps(job), file=server.stdin, flush=True)
    assert int(server.stdout.readline())
    return list(files.values())


def outputs(files):
    """What a process printed, when it has ended."""
    out, err = files
    end = time.monotonic() + 300
    while not (err.exists() and err.read_text().endswith("ended\n")):
        assert "Traceback" not in (err.read_text() if err.exists() else ""), err.read_text()
        assert time.monotonic() < end, "it does not end"
        time.sleep(0.02)
    return out.read_text().strip(), err.read_text()


def fresh(forks, tmp_path, **variables):
    """The outputs of a new process."""
    return outputs(start(forks, tmp_path, **variables))


def compiler(tmp_path, body):
    """A program that stands in for the compiler."""
    path = tmp_path / "fake-cxx"
    path.write_text(f"#!/bin/sh\necho called >> {tmp_path}/calls\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@pytest.fixture(autouse=True)
def not_built_ahead(request):
    """The tests of building start from a checkout without a library next to the package."""
    if "tmp_path" in request.fixturenames and CPU.packaged().exists():
        pytest.skip("built ahead: nothing is compiled")


def test_the_reference_runs_without_a_compiler(forks, tmp_path):
    output, warnings = fresh(forks, tmp_path, CXX="no-such-compiler")
    assert output == "None | torch reference: no C++ compiler (CXX=no-such-compiler)"
    assert warnings.count("the torch reference runs on the CPU: no C++ compiler") == 1


def test_the_reference_runs_when_the_compiler_fails(forks, tmp_path):
    broken = compiler(tmp_path, "echo 'ops.cpp:1: error: it hurts' >&2; exit 1")
    output, warnings = fresh(forks, tmp_path, CXX=broken)
    assert output.endswith("fake-cxx failed: ops.cpp:1: error: it hurts")
    assert warnings.count("it hurts") == 1
    assert not list((tmp_path / "cache").rglob("*.so"))  # nothing incomplete stays


def test_a_broken_library_is_refused(forks, tmp_path):
    output, _ = fresh(forks, tmp_path, CXX=compiler(tmp_path, "for f; do :; done; echo junk > $f"))
    assert output.startswith("None | torch reference: ")


def test_it_can_be_switched_off(forks, tmp_path):
    output, warnings = fresh(forks, tmp_path, DTQ_KERNELS="0")
    assert output == "None | torch reference: DTQ_KERNELS=0"
    assert "dtq:" not in warnings


def test_a_cache_that_cannot_be_written_is_reported(forks, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    output, _ = fresh(forks, tmp_path)
    assert "torch reference: " in output


def test_an_import_compiles_nothing(forks):
    _, cache = forks
    assert not list(cache.iterdir())


@pytest.mark.slow
def test_two_processes_compile_once(forks, library, tmp_path):
    counting = compiler(tmp_path, 'exec g++ "$@" -O0')  # the last -O counts
    running = [start(forks, tmp_path, CXX=counting, DTQ_CPU_ISA="ref") for _ in range(2)]
    printed = [outputs(files) for files in running]
    assert all(out.startswith("ref | ref kernels, cached") for out, _ in printed), printed
    assert sum(err.count("compiling CPU kernels, once") for _, err in printed) == 1
    units = (tmp_path / "calls").read_text().count("called")
    assert units <= len(gcc.UNITS) + 1
    _, err = fresh(forks, tmp_path, CXX=counting)
    assert "compiling" not in err


def test_explain_names_what_runs():
    used, here, _ = explain(LinearProblem(FORMATS["int8-row"], ACTIVATION_FORMATS["int8-row"]))
    assert used == "w8a8: used"
    assert here == f"on the CPU: {CPU.describe()}"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_library_needs_only_the_stable_abi(isa):
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", CPU.path], check=True, capture_output=True, text=True
    )
    symbols = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
    of_torch = {name for name in symbols if name.startswith(("aoti_", "torch_"))}
    assert len(of_torch) > 20
    allowed = set((ROOT / "tests" / "abi.txt").read_text().split())
    assert of_torch <= allowed, sorted(of_torch - allowed)
    # nothing of torch's C++, whose names change with every version
    assert not [n for n in symbols if "c10" in n or "N2at" in n or "N5torch" in n]
