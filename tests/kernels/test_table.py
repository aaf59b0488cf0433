# SPDX-License-Identifier: Apache-2.0
"""Every op: schema, fake, exact integers. Every kernel against the reference at awkward sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.kernels import KERNELS, LinearProblem, explain, pick
from dtq.kernels.graph_constant import graph_constant
from dtq.linalg.hadamard import fwht

ops = torch.ops.dtq
ROWS = [0, 1, 17, 118]


def operands(m, n=48, k=128, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    w = torch.randn(n, k, generator=g) * 0.05
    return x, w, torch.randn(n, generator=g)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("activations", ["none", "int8-row", "int4-row", "int4-g64"])
def test_the_chosen_kernel_agrees_with_the_reference(m, fmt, activations):
    k = max(128, fmt.group or 0)
    x, w, bias = operands(m, k=k)
    problem = LinearProblem(fmt, ACTIVATION_FORMATS[activations], 64)
    parts = fmt.pack(w, fmt.compute_qparams(w))
    scale = (torch.rand(k) + 0.5).to(torch.bfloat16)
    parts["pre_quant_scale"] = scale.reshape(1, -1)
    got = pick(problem).call(problem, x, parts, bias)
    want = KERNELS[-1].call(problem, x, parts, bias)
    assert got.shape == (m, 48)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "activations", [name for name, a in ACTIVATION_FORMATS.items() if a.block_format]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_block_formats_are_multiplied_in_every_dtype(activations, dtype):
    x, w, bias = operands(20)
    fmt = FORMATS["nvfp4"]
    problem = LinearProblem(fmt, ACTIVATION_FORMATS[activations], 64)
    parts = fmt.pack(w, fmt.compute_qparams(w))
    kernel = pick(problem)
    assert kernel.name == ("fp4" if activations == "nvfp4" else "float-product")
    want = kernel.call(problem, x, parts, bias)
    for tokens in (4, 20):
        got = kernel.call(problem, x[:tokens].to(dtype), parts, bias)
        assert got.dtype == dtype
        # rounding the input to dtype may move some values to the next value of a coarse format
        assert (got.float() - want[:tokens]).norm() < 0.03 * want[:tokens].norm()


def test_an_input_transform_may_leave_the_range_of_float16():
    x, w, bias = operands(4)
    fmt = FORMATS["nvfp4"]
    parts = fmt.pack(w, fmt.compute_qparams(w)) | {
        "pre_quant_scale": torch.full((1, 128), 2.0**10).bfloat16()
    }
    problem = LinearProblem(fmt, ACTIVATION_FORMATS["nvfp4"], 64)
    x = (x * 1000).half()
    y = pick(problem).call(problem, x / 2**10, parts, bias)
    assert torch.isfinite(y).all()
    plain = {k: v for k, v in parts.items() if k != "pre_quant_scale"}
    torch.testing.assert_close(y, pick(problem).call(problem, x, plain, bias), rtol=0.02, atol=2)


@pytest.mark.parametrize("k", [1, 2, 37, 4160])
@pytest.mark.parametrize("m", [1, 17, 118])
def test_w8a8_is_exact_integer_arithmetic(m, k):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=g)
    weight = torch.randint(-127, 128, (33, k), dtype=torch.int8, generator=g)
    one = torch.ones(m), torch.ones(33, 1)
    got = ops.w8a8_linear(codes, one[0], weight, one[1], None, torch.float32)
    assert torch.equal(got, (codes.long() @ weight.long().T).float())


def test_packed_and_expanded_w4a8_give_the_same_bits():
    x, w, bias = operands(17)
    fmt = FORMATS["int4-2l-g64"]
    parts = fmt.pack(w, fmt.compute_qparams(w))
    codes, scale = ops.quantize_rows(x, None, 1, None)
    packed = ops.w4a8_linear(
        codes, scale, parts["weight"], parts["weight_scale"], parts["weight_scale_2"], bias, x.dtype
    )
    expanded = fmt.expand(parts["weight"], parts["weight_scale_2"])
    assert torch.equal(
        packed, ops.w8a8_linear(codes, scale, expanded, parts["weight_scale"], bias, x.dtype)
    )


def test_a_token_does_not_depend_on_its_batch():
    x, _, _ = operands(64)
    scale = (torch.rand(128) - 0.5).to(torch.bfloat16)
    codes, scales = ops.quantize_rows(x, scale, 64, None)
    for i in (0, 13, 63):
        one, s = ops.quantize_rows(x[i : i + 1], scale, 64, None)
        assert torch.equal(one[0], codes[i])
        assert torch.equal(s[0], scales[i])


def test_zero_rows_and_ties():
    x = torch.zeros(2, 64)
    x[1, :3] = torch.tensor([127.0, 0.5, 1.5])
    codes, scale = ops.quantize_rows(x, None, 1, None)
    assert codes[0].eq(0).all()
    assert scale.tolist() == [1.0, 1.0]
    assert codes[1, :3].tolist() == [127, 0, 2]  # ties to even


def test_quantize_rows_is_the_transform_then_rounding():
    x, _, _ = operands(9)
    pre = (torch.rand(128) + 0.5).to(torch.bfloat16)
    codes, scale = ops.quantize_rows(x, pre, 32, None)
    want = fwht(x * pre.float(), 32)
    assert ((codes.float() * scale[:, None] - want).abs() <= scale[:, None] * 0.5001).all()
    fixed = torch.tensor([0.01])
    codes, scale = ops.quantize_rows(x, None, 1, fixed)
    assert scale.eq(0.01).all()
    assert codes.abs().max() == 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_op_passes_opcheck(dtype):
    x, w, bias = operands(5)
    x, bias = x.to(dtype), bias.to(dtype)
    pre = torch.ones(128, dtype=torch.bfloat16)
    torch.library.opcheck(ops.quantize_rows, (x, pre, 64, None))
    codes, scale = ops.quantize_rows(x, pre, 64, None)
    p = FORMATS["int8-row"].pack(w, FORMATS["int8-row"].compute_qparams(w))
    torch.library.opcheck(
        ops.w8a8_linear, (codes, scale, p["weight"], p["weight_scale"], bias, dtype)
    )
    args = (p["weight"], p["weight_scale"], bias, True, None, None, dtype)
    torch.library.opcheck(ops.w8a8_epilogue_linear, (codes, scale, *args))
    p = FORMATS["int4-2l-g64"].pack(w, FORMATS["int4-2l-g64"].compute_qparams(w))
    args = (p["weight"], p["weight_scale"], p["weight_scale_2"], bias, dtype)
    torch.library.opcheck(ops.w4a8_linear, (codes, scale, *args))
    both = torch.ones(1, len(bias), dtype=dtype), torch.ones(5, len(bias), dtype=dtype)
    torch.library.opcheck(ops.w4a8_epilogue_linear, (codes, scale, *args[:4], True, *both, dtype))
    both = *both, dtype, torch.ones(5, 16).half(), torch.ones(len(w), 16).half()
    torch.library.opcheck(ops.w4a8_epilogue_linear, (codes, scale, *args[:4], True, *both))
    args = (p["weight"], p["weight_scale"], torch.ones(len(w), 2, 16, dtype=torch.int8), bias)
    torch.library.opcheck(ops.lut4a8_linear, (codes, scale, *args, dtype))
    p = FORMATS["int4-asym-g64"].pack(w, FORMATS["int4-asym-g64"].compute_qparams(w))
    args = (p["weight"], p["weight_scale"], p["weight_zero_point"], 4, bias)
    torch.library.opcheck(ops.group_a8_linear, (codes, scale, *args, dtype))
    parts = FORMATS["int4-asym-g64"].pack(w, FORMATS["int4-asym-g64"].compute_qparams(w))
    weight = (list(parts.values()), list(parts), "int4-asym-g64")
    torch.library.opcheck(ops.dequantize, (*weight, 128, dtype))
    torch.library.opcheck(ops.weight_linear, (x, *weight, bias))
    torch.library.opcheck(ops.cached_linear, (x, *weight, pre, None, 64, 1, bias))
    up = torch.ones(1, 128, dtype=dtype)
    change, grid = (pre, None, 64, 1), (torch.tensor([0.1, 0.2]), torch.ones(1, dtype=torch.int64))
    torch.library.opcheck(ops.norm_quantize_rows, (x, up, up, 1e-6, *change, None, None))
    torch.library.opcheck(ops.gelu_quantize_rows, (x, *change, None, None))
    torch.library.opcheck(ops.binned_quantize_rows, (x, *change, *grid))
    torch.library.opcheck(ops.e4m3_quantize_rows, (x, *change))


def test_an_epilogue_is_gelu_gate_and_residual():
    x, w, bias = operands(6)
    p = FORMATS["int8-row"].pack(w, FORMATS["int8-row"].compute_qparams(w))
    codes, scale = ops.quantize_rows(x, None, 1, None)
    given = codes, scale, p["weight"], p["weight_scale"], bias
    y = ops.w8a8_linear(*given, torch.float32)
    gate, residual = torch.randn(2, len(bias)), torch.randn(6, len(bias))
    got = ops.w8a8_epilogue_linear(*given, True, gate, residual, torch.float32)
    activated = F.gelu(y, approximate="tanh")
    want = torch.cat([gate[:1] * activated[:3], gate[1:] * activated[3:]]) + residual
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises((ValueError, RuntimeError), match="a gate comes with a residual"):
        ops.w8a8_epilogue_linear(*given, False, gate, None, torch.float32)


def test_a_low_rank_branch_comes_before_gelu():
    x, w, bias = operands(6)
    p = FORMATS["int8-row"].pack(w, FORMATS["int8-row"].compute_qparams(w))
    codes, scale = ops.quantize_rows(x, None, 1, None)
    given = codes, scale, p["weight"], p["weight_scale"], bias
    low, up = torch.randn(6, 16).bfloat16(), torch.randn(len(bias), 16).bfloat16()
    y = ops.w8a8_linear(*given, torch.float32) + low.float() @ up.float().T
    got = ops.w8a8_epilogue_linear(*given, True, None, None, torch.float32, low, up)
    torch.testing.assert_close(got, F.gelu(y, approximate="tanh"), rtol=1e-5, atol=1e-5)
    with pytest.raises((ValueError, RuntimeError), match="two factors"):
        ops.w8a8_epilogue_linear(*given, True, None, None, torch.float32, low)


def test_a_table_of_int4_values_is_int4():
    x, w, bias = operands(5)
    fmt = FORMATS["int4-2l-g64"]
    p = fmt.pack(w, fmt.compute_qparams(w))
    byte = p["weight_scale_2"].view(torch.uint8).short()
    levels = (torch.arange(16) - (byte & 15).unsqueeze(-1)) * ((byte >> 4) + 1).unsqueeze(-1)
    codes, scale = ops.quantize_rows(x, None, 1, None)
    given = codes, scale, p["weight"], p["weight_scale"]
    want = ops.w4a8_linear(*given, p["weight_scale_2"], bias, torch.float32)
    got = ops.lut4a8_linear(*given, levels.to(torch.int8), bias, torch.float32)
    assert torch.equal(got, want)


def test_explain_names_every_refusal():
    lines = explain(LinearProblem(FORMATS["int4-asym-g64"], ACTIVATION_FORMATS["none"], 1))
    assert "not int8" in lines[0]
    assert "weight-only: used" in lines
    assert any(line.startswith("on the CPU: ") and "no compiled form" not in line for line in lines)
    lines = explain(LinearProblem(FORMATS["nf4-g64"], ACTIVATION_FORMATS["int8-row"], 1))
    assert "float-product: used" in lines
    lines = explain(
        LinearProblem(replace(FORMATS["nf4-g64"], name="mine"), ACTIVATION_FORMATS["int8-row"], 1)
    )
    assert "reference: used" in lines
    assert any(line.startswith("on the CPU: torch reference: no compiled form") for line in lines)


def test_a_device_gives_the_numbers_of_the_cpu(device):
    """Integer products agree bit for bit; float ones within rounding."""
    for fmt in FORMATS.values():
        x, w, bias = operands(33, k=max(128, fmt.group or 0))
        pre = (torch.rand(x.shape[1]) + 0.5).to(torch.bfloat16)
        problem = LinearProblem(fmt, ACTIVATION_FORMATS["int8-row"], 64)
        parts = fmt.pack(w, fmt.compute_qparams(w)) | {"pre_quant_scale": pre.reshape(1, -1)}
        want = pick(problem).call(problem, x, parts, bias)
        there = {k: v.to(device) for k, v in parts.items()}
        got = pick(problem).call(problem, x.to(device), there, bias.to(device)).cpu()
        if pick(problem).name in ("w8a8", "w4a8-two-level"):
            assert torch.equal(got, want), fmt.name
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_constant_of_a_graph_is_marked_as_torch_marks_it():
    def ours():
        return 1

    def theirs():
        return 1

    assert graph_constant(ours) is ours
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
