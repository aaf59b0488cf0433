# SPDX-License-Identifier: Apache-2.0
"""Packed weights on the CPU: every format decoded bit for bit, and products with float inputs."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from dtq.formats import FORMATS
from dtq.formats.gguf import HalfBlock, KQuant
from dtq.formats.lut_two_level import TwoLevelLut
from dtq.kernels.compile.format_codes import decoded, format_code

compiled = torch.ops.dtq
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(128, 256), (67, 384), (9, 2432)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def stored(name, n, k, seed=0):
    """The packed tensors of a random matrix whose rows differ in scale."""
    return {key: tensor.clone() for key, tensor in _stored(name, n, k, seed).items()}


@functools.cache
def _stored(name, n, k, seed):  # codebooks take long to learn
    fmt = FORMATS[name]
    w = random(n, k, seed=seed) * torch.logspace(-2, 1, n).unsqueeze(1)
    return fmt.pack(w, fmt.compute_qparams(w))


def arguments(name, parts):
    return list(parts.values()), list(parts), name


def allowed(x, w, want):
    """Half a unit in the last place of the output, and the rounding of float32 sums of K products."""
    size = x.double().abs() @ w.double().abs().T
    return want.abs() * torch.finfo(x.dtype).eps * 0.51 + size * x.shape[1] ** 0.5 * 2.0**-23


def shapes(name):
    codebook = FORMATS[name].vector > 1
    return [(n, k) for n, k in SHAPES if not (codebook and n * k < 4096 * FORMATS[name].vector)]


def test_every_format_has_a_code():
    left = {type(fmt) for fmt in FORMATS.values() if format_code(fmt) is None}
    assert left == {KQuant, HalfBlock, TwoLevelLut}  # decoded by torch


def test_other_formats_are_decoded_by_torch(isa):
    for name in set(FORMATS) - set(decoded()):
        parts, x = stored(name, 7, 256), random(3, 256, seed=1)
        w = FORMATS[name].unpack(parts)
        assert torch.equal(compiled.dequantize(*arguments(name, parts), 256, torch.float32), w)
        got = compiled.weight_linear(x, *arguments(name, parts), None)
        torch.testing.assert_close(got, x @ w.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", decoded())
def test_decoded_as_the_format_unpacks(isa, name):
    for n, k in shapes(name):
        parts = stored(name, n, k)
        given = arguments(name, parts)
        for dtype in DTYPES:
            got = compiled.dequantize(*given, k, dtype)
            assert got.dtype == dtype
            assert torch.equal(got, FORMATS[name].unpack(parts).to(dtype)), (n, k, dtype)


@pytest.mark.parametrize("name", ["int8-row", "ternary-row", "trit-row", "fp8-row", "int4-row"])
@pytest.mark.parametrize("k", [2, 6, 20, 30, 257 * 4])
def test_rows_that_end_anywhere(isa, name, k):
    if k % 4 and name == "ternary-row":
        k += 2
    parts = stored(name, 7, k)
    given, x = arguments(name, parts), random(3, k, seed=1)
    w = FORMATS[name].unpack(parts)
    assert torch.equal(compiled.dequantize(*given, k, torch.float32), w)
    want = x.double() @ w.double().T
    assert ((compiled.weight_linear(x, *given, None) - want).abs() <= allowed(x, w, want)).all()


def test_every_byte_of_every_format(isa):
    """Also bytes that ``pack`` never writes: a file may hold any."""
    for name in decoded():
        n, k = 128, 1280
        parts = stored(name, n, k)
        codes = parts["weight"].view(torch.int8)
        codes.copy_(int8(*codes.shape))
        if "weight_scale_2" in parts and parts["weight_scale_2"].dtype == torch.int8:
            parts["weight_scale_2"] = int8(*parts["weight_scale_2"].shape, seed=1)
        if "weight_zero_point" in parts:
            parts["weight_zero_point"] = int8(*parts["weight_zero_point"].shape, seed=2)
        if parts.get("weight_scale", codes).dtype == torch.uint8:
            parts["weight_scale"] = int8(*parts["weight_scale"].shape, seed=3).view(torch.uint8)
        got = compiled.dequantize(*arguments(name, parts), k, torch.float32)
        want = FORMATS[name].unpack(parts)
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got.nan_to_num(), want.nan_to_num()), name


@pytest.mark.parametrize("name", decoded())
@pytest.mark.parametrize("m", [1, 3, 16, 17])
def test_products_are_those_of_the_decoded_weight(isa, name, m):
    for n, k in shapes(name):
        given = arguments(name, stored(name, n, k))
        for dtype in DTYPES:
            x, bias = random(m, k, seed=1).to(dtype), random(n, seed=2).to(dtype)
            w = FORMATS[name].unpack(dict(zip(given[1], given[0], strict=True)))
            w = w.to(dtype).double()
            got = compiled.weight_linear(x, *given, bias)
            assert got.dtype == dtype
            assert got.shape == (m, n)
            want = x.double() @ w.T + bias.double()
            limit = allowed(x, w, want) + bias.double().abs() * 2.0**-22
            assert ((got.double() - want).abs() <= limit).all(), (n, k, dtype)


@pytest.mark.parametrize("m", [1, 5, 16, 17])
def test_float_weights_are_multiplied(isa, m):
    for n, k in [(1, 1), (7, 40), (33, 1056)]:
        for dtype in DTYPES:
            x, w, bias = (
                random(*s, seed=i).to(dtype) for i, s in enumerate([(m, k), (n, k), (n,)])
            )
            got = compiled.float_linear(x, w, bias)
            assert (got.dtype, got.shape) == (dtype, (m, n))
            want = x.double() @ w.double().T + bias.double()
            limit = allowed(x, w.double(), want) + bias.double().abs() * 2.0**-22
            assert ((got.double() - want).abs() <= limit).all(), (n, k, dtype)


def test_a_token_does_not_depend_on_its_batch_or_the_threads(isa):
    given = arguments("int4-asym-g64", stored("int4-asym-g64", 301, 384))
    x = random(16, 384).bfloat16()
    whole = compiled.weight_linear(x, *given, None)
    for part in (1, 2, 3, 4, 7):
        pieces = [compiled.weight_linear(p, *given, None) for p in x.split(part)]
        assert torch.equal(torch.cat(pieces), whole), part
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(compiled.weight_linear(x, *given, None), whole), threads
    finally:
        torch.set_num_threads(before)


def test_nothing_to_multiply(isa):
    given = arguments("int8-row", stored("int8-row", 8, 64))
    assert compiled.weight_linear(random(0, 64), *given, None).shape == (0, 8)


def test_strided_tokens_and_a_bias_of_another_type(isa):
    given = arguments("nf4-g64", stored("nf4-g64", 40, 128))
    x, bias = random(12, 300)[::2, 5:133].bfloat16(), random(40)
    got = compiled.weight_linear(x, *given, bias)
    assert torch.equal(got, compiled.weight_linear(x.contiguous(), *given, bias.bfloat16()))


def test_groups_that_the_decoder_does_not_take(isa):
    fmt = FORMATS["int8-g64"]
    w = random(6, 40)
    parts = fmt.pack(
        torch.nn.functional.pad(w, (0, 24)),
        fmt.compute_qparams(torch.nn.functional.pad(w, (0, 24))),
    )
    parts = {
        "weight": parts["weight"][:, :40].contiguous(),
        "weight_scale": parts["weight_scale"].repeat(1, 2),
    }
    got = compiled.dequantize(*arguments("int8-g64", parts), 40, torch.float32)  # groups of 20
    assert torch.equal(got, fmt.unpack(parts))


def test_parts_that_do_not_fit_are_refused(isa):
    parts = stored("int4-asym-g64", 8, 128)
    given, names, name = arguments("int4-asym-g64", parts)
    twice = [given[0], given[1].repeat(2, 1), *given[2:]]
    with pytest.raises(RuntimeError, match="weight_scale has 64 bytes, expected 32"):
        compiled.dequantize(twice, names, name, 128, torch.float32)
    with pytest.raises(RuntimeError, match="weight has 512 bytes, expected 256"):
        compiled.dequantize(given, names, name, 64, torch.float32)
    with pytest.raises(RuntimeError, match="lacks weight_scale"):
        compiled.dequantize(given[:1], ["weight"], name, 128, torch.float32)
    with pytest.raises(RuntimeError, match="has no tensor more"):
        compiled.dequantize([*given, given[0]], [*names, "more"], name, 128, torch.float32)


def test_opcheck(isa):
    given = arguments("int4-g64", stored("int4-g64", 33, 128))
    torch.library.opcheck(compiled.dequantize, (*given, 128, torch.bfloat16))
    for m in (2, 40):
        torch.library.opcheck(compiled.weight_linear, (random(m, 128), *given, random(33)))


def test_the_reference_gives_the_same(library):
    given = arguments("lut4-g64", stored("lut4-g64", 33, 128))
    x = random(40, 128).bfloat16()
    assert torch.equal(
        compiled.weight_linear(x, *given, None),
        F.linear(x, torch.ops.dtq_reference.dequantize(*given, 128, torch.bfloat16)),
    )
