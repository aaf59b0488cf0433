# SPDX-License-Identifier: Apache-2.0
"""The row and weight kernels of cuda_ext on the emulator: bit-identical to the torch reference."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_bool,
    c_float,
    c_int,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dtq.formats import FORMATS
from dtq.formats.floats import MxFp4, NvFp4
from dtq.formats.grid import Grid
from dtq.formats.integer import Int, TwoLevelInt
from dtq.formats.lut import Lut
from dtq.formats.ternary import Ternary
from dtq.formats.vq import Vq
from dtq.kernels import ops_quantize
from dtq.kernels.compile.format_codes import decoded

reference = torch.ops.dtq_reference
SOURCES = Path(__file__).parent.parent.parent / "cuda_ext"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
AS_IS, GELU, NORM = range(3)
INT8, E4M3, FLOAT = range(3)
# no contraction: the kernels round products and sums on their own
FLAGS = ("-std=c++20", "-ffp-contract=off", "-DDTQ_SIM", "-w")
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-sanitize=null,object-size,pointer-overflow",  # address sanitizer finds what these would access
)
# address sanitizer cannot follow frames from one fiber's stack to the heap
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}

pytestmark = [
    pytest.mark.slow,  # they compile
    pytest.mark.skipif(not shutil.which("g++"), reason="the emulator needs g++"),
]


class Rows(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("type", c_int),
        ("rows", c_int64),
        ("columns", c_int64),
        ("stride", c_int64),
        ("prologue", c_int),
        ("modulate_scale", c_void_p),
        ("modulate_shift", c_void_p),
        ("modulate_type", c_int),
        ("modulate_stride", c_int64),
        ("rows_per_modulate", c_int64),
        ("eps", c_float),
        ("pre_scale", c_void_p),
        ("perm", c_void_p),
        ("hadamard_block", c_int64),
        ("num_rotations", c_int),
        ("output", c_int),
        ("qmax", c_int),
        ("static_scale", c_void_p),
        ("bin", c_void_p),
        ("rounding", c_int),
        ("out_type", c_int),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("block_scale", c_void_p),
        ("width", c_int64),
        ("scale", c_void_p),
        ("sums", c_void_p),
        ("next_may_start", c_bool),
    ]


class Weight(Structure):
    _fields_ = [
        ("encoding", c_int),
        ("bits", c_int),
        ("rows", c_int64),
        ("columns", c_int64),
        ("weight", c_void_p),
        ("tail", c_void_p),
        ("scale_type", c_int),
        ("scale", c_void_p),
        ("scale_2", c_void_p),
        ("groups", c_int64),
        ("zero", c_void_p),
        ("offset", c_int),
        ("group_bytes", c_void_p),
        ("codebook", c_void_p),
        ("format_codebook", c_float * 16),
        ("words", c_void_p),
        ("vector", c_int),
    ]


class SmallM(Structure):
    _fields_ = [
        ("weight", Weight),
        ("x", c_void_p),
        ("type", c_int),
        ("tokens", c_int64),
        ("stride", c_int64),
        ("bias", c_void_p),
        ("y", c_void_p),
    ]


def compile_host(target: Path) -> ctypes.CDLL:
    source = str(SOURCES / "tests" / "rows_host.cpp")
    command = ["g++", "-O2", *FLAGS, "-fPIC", "-shared", source, "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    for name in ("size_of_rows", "size_of_weight", "size_of_small_m"):
        getattr(library, name).restype = ctypes.c_size_t
    library.launches.restype = c_uint64
    library.use_seed.argtypes = [c_uint64]
    library.last_error.restype = library.why.restype = ctypes.c_char_p
    library.rows.argtypes, library.small_m.argtypes = [POINTER(Rows)], [POINTER(SmallM)]
    library.dequantize.argtypes = [POINTER(Weight), c_void_p, c_int]
    library.e4m3_to_float.argtypes, library.e4m3_to_float.restype = [c_uint32], c_float
    library.float_to_e4m3.argtypes, library.float_to_e4m3.restype = [c_float], c_uint32
    assert library.size_of_rows() == ctypes.sizeof(Rows)
    assert library.size_of_weight() == ctypes.sizeof(Weight)
    assert library.size_of_small_m() == ctypes.sizeof(SmallM)
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_host(tmp_path_factory.mktemp("cuda") / "rows.so")


def test_they_touch_only_their_memory(tmp_path):
    program = tmp_path / "test_rows"
    source = str(SOURCES / "tests" / "test_rows.cpp")
    subprocess.run(["g++", "-O1", *FLAGS, *SANITIZE, source, "-o", str(program)], check=True)
    done = subprocess.run([program, "2"], capture_output=True, text=True, env=os.environ | OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def run_rows(
    library,
    x,
    *,
    output=INT8,
    prologue=AS_IS,
    modulate=None,
    eps=1e-6,
    pre=None,
    perm=None,
    hadamard_block=1,
    num_rotations=1,
    qmax=127,
    scale=None,
    bin=None,
    pad=0,
    sums=False,
    seed=1,
):
    """``(out, scale)`` or ``(out, scale, sums)`` as the kernel writes them; poison where it does not."""
    m, k = x.shape
    width = k + pad
    dtype = (torch.int8, torch.uint8, torch.float32)[output]
    out = torch.full((m, width), 99, dtype=dtype)
    measured = torch.full((m,), -5.0)
    x_sums = torch.full((m,), -7, dtype=torch.int32)
    r = Rows(
        x=address(x),
        type=DTYPES[x.dtype],
        rows=m,
        columns=k,
        stride=x.stride(0),
        prologue=prologue,
        eps=eps,
        pre_scale=address(pre),
        perm=address(perm),
        hadamard_block=hadamard_block,
        num_rotations=num_rotations,
        output=output,
        qmax=qmax,
        static_scale=address(scale),
        bin=address(bin),
        out=address(out),
        out_stride=width,
        width=width if pad else 0,
        scale=address(measured),
        sums=address(x_sums) if sums else None,
    )
    if modulate is not None:
        r.modulate_scale, r.modulate_shift = (address(t) for t in modulate)
        r.modulate_type = DTYPES[modulate[0].dtype]
        r.modulate_stride = modulate[0].stride(0)
        r.rows_per_modulate = m // len(modulate[0])
    library.use_seed(seed)
    status = library.rows(byref(r))
    assert status == 0, (status, library.last_error(), library.why(status))
    assert not out[:, k:].any()
    return (out[:, :k], measured, x_sums) if sums else (out[:, :k], measured)


def same(got, want):
    """Dtypes and values, NaN where the other is NaN."""
    return all(
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(got, want, strict=True)
    )  # fmt: skip


def pre_scale(k, seed=1):
    return (torch.rand(k, generator=torch.Generator().manual_seed(seed)) - 0.5).bfloat16()


# ---------------------------------------------------------------------------- rows

# both kernels, every number of threads, a last run that is not whole, rows longer than registers hold
SHAPES = [(1, 16), (5, 96), (3, 1152), (2, 1536), (3, 1552), (2, 3072), (1, 4608), (1, 12800)]
ODD = [(1, 1), (4, 2), (3, 15), (2, 37), (3, 1001), (1, 2050), (1, 25001)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_rows_gives_the_bits_of_the_reference(library, dtype):
    for seed, (m, k) in enumerate(SHAPES + ODD):
        x = (random(m, k, seed=seed) * 3).to(dtype)
        x[0, : k // 2] = 0
        for levels, pre in ((127, None), (7, pre_scale(k))):
            got = run_rows(library, x, pre=pre, qmax=levels, seed=seed)
            assert same(got, reference.quantize_rows(x, pre, 1, None, levels)), (m, k, levels)


def test_every_block_of_the_rotation(library):
    for k in (192, 8192):
        x = random(2, k).bfloat16()
        block = 1
        while k % block == 0:
            got = run_rows(library, x, pre=pre_scale(k), hadamard_block=block, seed=block)
            assert same(got, reference.quantize_rows(x, pre_scale(k), block, None)), (k, block)
            block *= 2


def test_rotations_of_rows_that_do_not_fill_their_tiles(library):
    for k, block in [(1152, 128), (2304, 256), (3072, 1024), (6144, 2048), (12288, 4096), (8, 8)]:
        x = random(2, k, seed=k)
        got = run_rows(library, x, hadamard_block=block)
        assert same(got, reference.quantize_rows(x, None, block, None)), (k, block)


def test_static_scales_and_the_scale_of_a_bin(library):
    scales = torch.tensor([0.02, 0.005, 3.0])
    for k in (64, 37):
        x = random(3, k) * 2
        want = reference.quantize_rows(x, None, 1, scales[:1])
        assert same(run_rows(library, x, scale=scales), want)
        at = torch.tensor([2])
        args = (x, None, None, 1, 1, scales, at, 127)
        assert same(
            run_rows(library, x, scale=scales, bin=at), reference.binned_quantize_rows(*args)
        )


def test_rows_that_are_not_numbers(library):
    inf, nan = torch.inf, torch.nan
    x = random(9, 48) * 2
    x[0] = 0
    x[1, 3], x[2, 47] = nan, -nan
    x[3, 5], x[4, 7] = inf, -inf
    x[5, 0], x[5, 1], x[5, 2] = nan, inf, -inf
    x[6], x[7], x[8] = 1e-30, 3e38, 1e-42
    ties = torch.zeros(1, 48)
    ties[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    x = torch.cat([x, ties])
    for scale in (None, torch.tensor([0.01]), torch.tensor([1e-8])):
        for columns in (48, 47):
            part = x[:, :columns].contiguous()
            got = run_rows(library, part, scale=scale)
            assert same(got, reference.quantize_rows(part, None, 1, scale)), (scale, columns)


def test_strides_addresses_and_padding(library):
    big = random(9, 400).bfloat16()
    for x in (big[1:6, 8:136], big[1:6, 3:131], big[::2, :48], big[:, 5:38]):
        want = reference.quantize_rows(x, None, 1, None)
        for pad in (0, 3, 16):
            assert same(run_rows(library, x, pad=pad), want), (x.shape, pad)


def test_sums_of_codes(library):
    for k in (48, 1552, 3072, 5000):
        codes, _, sums = run_rows(library, random(3, k, seed=k), sums=True)
        assert torch.equal(sums, codes.sum(1, dtype=torch.int32))


def test_far_apart_and_no_rows(library):
    apart = (
        2**30 + 8
    )  # elements, so that the third row starts beyond 4 GiB; untouched memory is free
    x = torch.empty(2 * apart + 64, dtype=torch.bfloat16).as_strided((3, 64), (apart, 1))
    x.copy_(random(3, 64))
    assert same(run_rows(library, x), reference.quantize_rows(x, None, 1, None))
    before = library.launches()
    assert run_rows(library, random(0, 64))[0].shape == (0, 64)
    assert library.launches() == before


def test_transform_rows_gives_the_bits_of_the_reference(library):
    cases = [(3, 192, 64, 1), (2, 1152, 128, 2), (3, 60, 4, 2), (1, 4096, 64, 2), (1, 26624, 32, 2)]
    for m, k, block, num_rotations in cases:
        shuffled = torch.randperm(k, generator=torch.Generator().manual_seed(k)).int()
        for order in (None, shuffled):
            x = random(m, k, seed=k).bfloat16()
            args = (x, pre_scale(k), order, block, num_rotations)
            options = {
                "pre": pre_scale(k),
                "perm": order,
                "hadamard_block": block,
                "num_rotations": num_rotations,
            }
            got = run_rows(library, x, output=FLOAT, **options)
            assert same(got[:1], [reference.transform_rows(*args)]), (m, k, block, num_rotations)
            if k < 20000:
                want = reference.binned_quantize_rows(*args, None, None, 127)
                assert same(run_rows(library, x, **options), want), (m, k, block, num_rotations)


def test_norm_and_modulate(library):
    for m, k, images in [(4, 64, 2), (6, 1152, 3), (2, 3072, 1), (2, 5120, 2), (3, 100, 3)]:
        x = (random(m, k) * 4 + 1).bfloat16()
        both = random(images, 2 * k, seed=3).bfloat16()
        modulate = both[:, :k], both[:, k:]
        block = 64 if k % 64 == 0 else 4
        change = (pre_scale(k), None, block, 1)
        for parts in (modulate, None, (modulate[0].float(), modulate[1].float())):
            args = (x, *(parts or (None, None)), 1e-6, *change, None, None, 127)
            got = run_rows(
                library,
                x,
                prologue=NORM,
                modulate=parts,
                pre=change[0],
                hadamard_block=block,
                eps=1e-6,
            )
            assert same(got, reference.norm_quantize_rows(*args)), (m, k)
    x, order = random(2, 96), torch.arange(95, -1, -1).int()
    args = (x, None, None, 1e-5, None, order, 32, 2, torch.tensor([0.03]), None, 31)
    got = run_rows(
        library,
        x,
        prologue=NORM,
        perm=order,
        hadamard_block=32,
        num_rotations=2,
        eps=1e-5,
        scale=args[8],
        qmax=31,
    )
    assert same(got, reference.norm_quantize_rows(*args))


def test_the_norm_is_the_norm(library):
    x = random(5, 1152) * 3 + 2
    scale, shift = random(1, 1152, seed=1), random(1, 1152, seed=2)
    y = ops_quantize.norm_modulate(x, scale, shift, 1e-6)
    want = F.layer_norm(x.double(), (1152,), eps=1e-6) * (1 + scale.double()) + shift.double()
    torch.testing.assert_close(y.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ops_quantize.sum_rows(x).double(), x.double().sum(1, True))


def test_gelu(library):
    x = torch.cat([random(4, 4608) * 3, torch.linspace(-12, 12, 4608).unsqueeze(0)])
    want = F.gelu(x.double(), approximate="tanh")
    assert ((ops_quantize.gelu(x) - want).abs() <= 3e-7 * want.abs() + 1e-7).all()
    for part in (x[:, :1152].contiguous(), x[:2], x[:, :53].bfloat16()):
        got = run_rows(library, part, prologue=GELU)
        args = (part, None, None, 1, 1, None, None, 127)
        assert same(got, reference.gelu_quantize_rows(*args)), part.shape
    edges = torch.tensor([[torch.inf, 0.0, -0.0, 100, -100, -3e38, 3e38, 1e-40], [torch.nan] * 8])
    args = (edges, None, None, 1, 1, None, None, 127)
    assert same(run_rows(library, edges, prologue=GELU), reference.gelu_quantize_rows(*args))
    assert ops_quantize.gelu(edges)[0, [0, 3, 6]].tolist() == [torch.inf, 100, edges[0, 6].item()]


def test_e4m3_rows(library):
    codes = torch.arange(256).to(torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    for c in range(256):
        mine = library.e4m3_to_float(c)
        assert mine == values[c] or (mine != mine and values[c].isnan())
    near = torch.cat([values[~values.isnan()], random(3000) * 100, random(3000) * 0.01])
    near = torch.cat([near, (near[:-1] + near[1:]) / 2, torch.linspace(-448, 448, 4097)])
    near = near.clamp(-448, 448)
    want = near.to(torch.float8_e4m3fn).view(torch.uint8)
    assert [library.float_to_e4m3(v) for v in near.tolist()] == want.tolist()
    for m, k, block in [(3, 64, 64), (2, 1001, 1), (1, 4608, 512)]:
        x = random(m, k)
        x[0, :3] = 0
        got = run_rows(library, x, output=E4M3, hadamard_block=block)
        want_codes, scale = reference.e4m3_quantize_rows(x, None, None, block, 1)
        assert same(got, (want_codes.view(torch.uint8), scale)), (m, k)
    zero = run_rows(library, torch.zeros(1, 48), output=E4M3)
    assert not zero[0].any()
    assert zero[1].tolist() == [0.0]


def test_what_rows_are_refused(library):
    def refused(**changes):
        x, out, scale = random(1, 96), torch.zeros(1, 96, dtype=torch.int8), torch.zeros(1)
        r = Rows(
            x=address(x), rows=1, columns=96, stride=96, hadamard_block=1, num_rotations=1, qmax=127
        )
        r.out, r.out_stride, r.width, r.scale = address(out), 96, 96, address(scale)
        for name, value in changes.items():
            setattr(r, name, value)
        status = library.rows(byref(r))
        return library.why(status).decode() if status else None

    assert refused() is None
    assert "whole blocks" in refused(hadamard_block=64)
    assert "whole blocks" in refused(hadamard_block=3)
    assert "8192" in refused(hadamard_block=16384, columns=16384, width=16384)
    assert "qmax" in refused(qmax=128)
    assert "two rotations" in refused(
        columns=32768, width=32768, num_rotations=2, hadamard_block=64
    )


# ---------------------------------------------------------------------------- weights


def stored(fmt, parts):
    """The `Weight` of a format's parts; the tensors must outlive it."""
    w = Weight(bits=4, weight=address(parts["weight"]), groups=1)
    scale = parts.get("weight_scale")
    if scale is not None:
        kinds = {torch.float32: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3, torch.uint8: 4}
        w.scale, w.scale_type, w.groups = address(scale), kinds[scale.dtype], scale.shape[1]
    if isinstance(fmt, Int):
        w.encoding, w.bits, w.zero = 0, fmt.bits, address(parts.get("weight_zero_point"))
        w.offset = 0 if fmt.bits == 8 else 2 ** (fmt.bits - 1)
    elif isinstance(fmt, TwoLevelInt):
        w.encoding, w.bits = 5, fmt.bits
        w.group_bytes, w.groups = address(parts["weight_scale_2"]), parts["weight_scale_2"].shape[1]
    elif isinstance(fmt, Grid | NvFp4 | MxFp4):
        values = (
            fmt.codebook.values if isinstance(fmt, Grid) else FORMATS["e2m1-row"].codebook.values
        )
        w.encoding, w.format_codebook = 1, (c_float * 16)(*values)
        w.scale_2 = address(parts.get("weight_scale_2"))
    elif isinstance(fmt, Lut):
        w.encoding, w.bits, w.codebook = 1, fmt.bits, address(parts["weight_lut"])
    elif isinstance(fmt, Vq):
        w.encoding, w.bits, w.words = 3, fmt._bits, address(parts["weight_lut"])
        w.vector = fmt.vector
    elif isinstance(fmt, Ternary):
        w.encoding, w.bits, w.offset = (4, 2, 0) if fmt.trits else (0, 2, 1)
        w.tail = address(parts.get("weight_tail"))
    else:
        w.encoding, w.bits = 2, 8
    return w


def packed(fmt, n, k, seed=0):
    """Random bytes in the layout of the format, scales of the size of a weight's."""
    g = torch.Generator().manual_seed(seed)
    parts = {}
    for name, spec in fmt.tensor_specs((n, k)).items():
        if spec.dtype in (torch.int8, torch.uint8):
            low, high = (116, 128) if spec.dtype == torch.uint8 else (0, 256)
            if name == "weight_tail" or isinstance(fmt, Ternary):
                high = 3 if name == "weight_tail" else 243
            if isinstance(fmt, Ternary) and not fmt.trits:  # 3 is no ternary code
                codes = torch.randint(0, 3, (n, k), generator=g)
                parts[name] = fmt._pack_codes(codes.to(torch.uint8))["weight"]
                continue
            drawn = torch.randint(low, high, spec.shape, generator=g).to(torch.uint8)
            parts[name] = drawn.view(spec.dtype)
        else:
            value = torch.rand(spec.shape, generator=g) * 0.05 + 0.001
            if name == "weight_lut" or spec.shape == (n, k):
                value = torch.randn(spec.shape, generator=g)
            parts[name] = value.to(spec.dtype)
    return parts


def as_in_a_checkpoint(fmt, n, k, seed=0):
    """The same with zero points and group bytes that a checkpoint may have."""
    parts = packed(fmt, n, k, seed)
    w = random(n, k, seed=seed) + random(n, 1, seed=seed + 1)
    written = fmt.pack(w, fmt.compute_qparams(w))
    for name in ("weight_zero_point", "weight_scale_2"):
        if name in parts and parts[name].dtype == torch.int8:
            parts[name] = written[name]
    return parts


def columns_of(fmt):
    """Row lengths: whole groups; without groups also one that ends amid a run of 16."""
    if isinstance(fmt, Ternary) and fmt.trits:
        return (163, 60)
    return (3 * (fmt.group or 32), *(() if fmt.group else (104,)))


@pytest.mark.parametrize("name", decoded())
def test_every_format_is_decoded_to_the_bits_of_its_unpack(library, name):
    fmt = FORMATS[name]
    rows = 67 if isinstance(fmt, Vq) else 5
    for k in columns_of(fmt):
        parts = packed(fmt, rows, k, seed=k)
        want = fmt.unpack(parts)
        weight = stored(fmt, parts)
        weight.rows, weight.columns = rows, k
        for dtype, code in DTYPES.items():
            out = torch.full((rows, k), 9.0, dtype=dtype)
            status = library.dequantize(byref(weight), out.data_ptr(), code)
            assert status == 0, (library.why(status), library.last_error())
            assert torch.equal(out, want.to(dtype)), (k, dtype)


def run_few(library, fmt, parts, n, x, bias=None, seed=1):
    weight = stored(fmt, parts)
    weight.rows, weight.columns = n, x.shape[1]
    y = torch.full((len(x), n), 9.0, dtype=x.dtype)
    f = SmallM(
        weight=weight,
        x=address(x),
        type=DTYPES[x.dtype],
        tokens=len(x),
        stride=x.stride(0),
        bias=address(bias),
        y=address(y),
    )
    library.use_seed(seed)
    status = library.small_m(byref(f))
    assert status == 0, (library.why(status), library.last_error())
    return y


@pytest.mark.parametrize("name", decoded())
def test_few_tokens(library, name):
    """Against float64 of the same rounded weights: one rounding of the output, K float32 sums."""
    fmt = FORMATS[name]
    n = 67 if isinstance(fmt, Vq) else 19
    columns = columns_of(fmt)
    for m, k, dtype in [(1, columns[0], torch.bfloat16), (9, columns[-1], torch.float16)]:
        parts = as_in_a_checkpoint(fmt, n, k, seed=m)
        x, bias = random(m, k, seed=m).to(dtype), random(n, seed=2).to(dtype)
        w = fmt.unpack(parts).to(dtype).double()
        for b in (None, bias):
            y = run_few(library, fmt, parts, n, x, b).double()
            exact = x.double() @ w.T + (0 if b is None else b.double())
            size = x.double().abs() @ w.abs().T + 1
            bound = torch.finfo(dtype).eps * exact.abs() / 2 + 2**-22 * size
            assert ((y - exact).abs() <= bound).all(), (m, k)


INTEGERS = [
    name for name, f in FORMATS.items() if isinstance(f, Int | TwoLevelInt) and f.bits in (4, 8)
]


@pytest.mark.parametrize("name", INTEGERS)
def test_pairs_of_codes_are_the_rounded_weights(library, name):
    """A token with a single 1 is a column of the weight: its bits, in every place of a step."""
    fmt = FORMATS[name]
    for n, k, m in [(19, 128, 8), (33, 1152, 16), (5, 384, 17)]:
        parts = as_in_a_checkpoint(fmt, n, k, seed=k)
        want = fmt.unpack(parts).bfloat16()
        for first in range(0, k, max(m, k // 3 // m * m)):
            columns = torch.arange(first, first + m) % k
            x = F.one_hot(columns, k).bfloat16()
            y = run_few(library, fmt, parts, n, x, seed=first)
            assert torch.equal(y, want[:, columns].T), (k, first)


def test_few_tokens_of_4_bit_weights_anywhere(library):
    """Rows and tokens that do not fill a tile, and what the packed pairs do not support."""
    fmt = FORMATS["int4-g64"]
    for k, stride, offset in [(448, 448, 0), (448, 472, 8), (448, 449, 3), (96 * 2, 192, 0)]:
        n, m = 21, 11
        parts = as_in_a_checkpoint(fmt, n, k, seed=k)
        memory = random(m, stride, seed=k).bfloat16().reshape(-1)
        x = F.pad(memory, (0, 16))[offset:][: m * stride].reshape(m, stride)[:, :k]
        w = fmt.unpack(parts).bfloat16().double()
        exact = x.double() @ w.T
        y = run_few(library, fmt, parts, n, x).double()
        bound = 2**-8 * exact.abs() + 2**-22 * (x.double().abs() @ w.abs().T + 1)
        assert ((y - exact).abs() <= bound).all(), (k, stride, offset)


def test_few_tokens_add_up_exactly_where_that_is_possible(library):
    """Small integers: whatever the order, the sum is exact, so every column is seen just once."""
    fmt = FORMATS["int4-asym-g64"]
    for m, n, k in [(1, 16, 64), (2, 33, 448), (8, 7, 1152), (16, 17, 128), (17, 48, 320)]:
        parts = packed(fmt, n, k, seed=k)
        parts["weight_zero_point"] = parts["weight_zero_point"] & 15
        parts["weight_scale"] = torch.ones_like(parts["weight_scale"])
        x = torch.randint(-1, 2, (m, k), generator=torch.Generator().manual_seed(m)).bfloat16()
        want = F.linear(x.double(), fmt.unpack(parts).double()).bfloat16()
        for seed in (1, 2):
            assert torch.equal(run_few(library, fmt, parts, n, x, seed=seed), want), (m, n, k)


def test_a_token_does_not_depend_on_its_batch(library):
    fmt = FORMATS["nf4-g64"]
    parts = packed(fmt, 40, 320)
    x = random(20, 320).bfloat16()
    whole = run_few(library, fmt, parts, 40, x)
    for first, last in [(0, 1), (3, 12), (16, 20)]:
        alone = run_few(library, fmt, parts, 40, x[first:last])
        assert torch.equal(alone, whole[first:last])


def test_groups_that_are_no_power_of_two(library):
    fmt = Int("int4-g48", 4, group=48)
    parts = packed(fmt, 3, 144)
    weight = stored(fmt, parts)
    weight.rows, weight.columns = 3, 144
    out = torch.zeros(3, 144)
    assert library.dequantize(byref(weight), out.data_ptr(), 0) == 0
    assert torch.equal(out, fmt.unpack(parts))


def test_weights_at_odd_addresses(library):
    for name in ("int4-row", "int8-row", "int3-row", "vq-64x2", "int2-g64"):
        fmt = FORMATS[name]
        n, k = (67, 96) if isinstance(fmt, Vq) else (3, 64)
        parts = packed(fmt, n, k)
        room = torch.zeros(parts["weight"].numel() + 1, dtype=torch.int8)
        room[1:] = parts["weight"].flatten()
        moved = {**parts, "weight": room[1:].view(parts["weight"].shape)}
        weight = stored(fmt, moved)
        weight.rows, weight.columns = n, k
        out = torch.zeros(n, k)
        assert library.dequantize(byref(weight), out.data_ptr(), 0) == 0
        assert torch.equal(out, fmt.unpack(parts)), name


def test_what_weights_are_refused(library):
    parts = packed(FORMATS["int4-row"], 4, 64)
    for change in ({"bits": 5}, {"columns": 63}, {"groups": 7}, {"scale_type": 0}, {"encoding": 3}):
        weight = stored(FORMATS["int4-row"], parts)
        weight.rows, weight.columns = 4, 64
        for field, value in change.items():
            setattr(weight, field, value)
        status = library.dequantize(byref(weight), torch.zeros(4, 64).data_ptr(), 0)
        assert "fit together" in library.why(status).decode(), change
    fmt = Int("int4-g20", 4, group=20)
    parts = packed(fmt, 3, 40)
    weight = stored(fmt, parts)
    weight.rows, weight.columns = 3, 40
    status = library.dequantize(byref(weight), torch.zeros(3, 40).data_ptr(), 0)
    assert "multiple of 16" in library.why(status).decode()
