# SPDX-License-Identifier: Apache-2.0
"""A solver's result is representable and, on its own objective, never worse than rounding."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from dtq.calibrate.observers import InputStats, SampleOrigin
from dtq.errors import InputError
from dtq.formats import FORMATS, bits_per_weight
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io.schema import MethodSpec
from dtq.linalg import cholesky
from dtq.plan import LayerPlan, LayerSpec
from dtq.solvers import SOLVERS
from dtq.stages.solve_layer import RIDGE, TransformedInput, solve_layer
from dtq.transforms import TRANSFORMS

K = 256
ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
KINDS = """int4-asym-g64 int3-2l-g64 e2m1-row nvfp4-46 mxfp4 lut4-g64 twinlog3-row vq-256x4-row
vq-64x2 ternary-g64 trit-row"""
SOME = pytest.mark.parametrize("name", KINDS.split())  # one of each kind


@cache
def problem(seed: int = 0, rows: int = 2000, n: int = 48, k: int = K):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) * 0.4 + torch.eye(k)
    x = torch.randn(rows, k, generator=g) * torch.exp(0.6 * torch.randn(k, generator=g)) @ mix
    w = torch.randn(n, k, generator=g) * 0.05
    return w, x


def objective(w, w_q, hessian):
    d = (w_q - w).double()
    return float((d @ hessian.double() * d).sum())


def check_representable(fmt, w_q, params):
    assert torch.isfinite(w_q).all()
    assert torch.equal(fmt.fake_quantize(w_q, params), w_q)
    assert torch.equal(fmt.unpack(fmt.pack(w_q, params)), w_q)


@ALL
@pytest.mark.parametrize("seed", [0, 1])
def test_gptq_beats_clip_search_beats_rounding(fmt, seed):
    w, x = problem(seed)
    hessian = x[:1500].T @ x[:1500] / 1500
    held = x[1500:].T @ x[1500:] / 500
    result = {name: SOLVERS[name].call(w, fmt, hessian) for name in SOLVERS}
    for w_q, params in result.values():
        check_representable(fmt, w_q, params)
    diagonal = {n: objective(w, r, hessian.diagonal().diag()) for n, (r, _) in result.items()}
    assert diagonal["search"] <= diagonal["rtn"]
    error = {n: objective(w, r, hessian) for n, (r, _) in result.items()}
    # an 8-bit grid is so fine that group scales in bfloat16 decide; fewer must win clearly
    assert error["gptq"] <= error["rtn"] * (0.8 if bits_per_weight(fmt, (1152, 2304)) < 8 else 1.0)
    fresh = {n: objective(w, r, held) for n, (r, _) in result.items()}
    assert fresh["gptq"] <= fresh["rtn"]


@ALL
def test_gptq_without_correlations_is_clip_search(fmt):
    w, x = problem()
    for hessian in (torch.eye(K), x.square().mean(0).diag()):
        results = [SOLVERS[n].call(w, fmt, hessian)[0] for n in ("gptq", "search")]
        assert torch.equal(*results)
    plain = SOLVERS["gptq"].call(w, fmt)[0]
    assert torch.equal(plain, SOLVERS["search"].call(w, fmt)[0])
    if fmt.data_dependent:  # there is no clip to search
        assert torch.equal(plain, SOLVERS["rtn"].call(w, fmt)[0])
    else:
        unclipped = SOLVERS["gptq"].call(w, fmt, torch.eye(K), clip=False)[0]
        assert torch.equal(unclipped, SOLVERS["rtn"].call(w, fmt)[0])


def test_gptq_without_data_factors_nothing(monkeypatch):
    # of (15360, 15360) it is 1.9 GB
    monkeypatch.setattr(sys.modules["dtq.solvers.gptq"], "inverse_factor", None)
    w, _ = problem()
    w_q, _ = SOLVERS["gptq"].call(w, FORMATS["int4-g64"])
    assert torch.equal(w_q, SOLVERS["search"].call(w, FORMATS["int4-g64"])[0])


def test_gptq_factors_once_for_weights_that_read_the_same(monkeypatch):
    w, x = problem()
    hessian, factors, fmt = x.T @ x / len(x), {}, FORMATS["int4-g64"]
    expected = [SOLVERS["gptq"].call(rows, fmt, hessian)[0] for rows in (w, w[:9])]
    assert torch.equal(SOLVERS["gptq"].call(w, fmt, hessian, factors=factors)[0], expected[0])
    monkeypatch.setattr(sys.modules["dtq.solvers.gptq"], "inverse_factor", None)
    assert torch.equal(SOLVERS["gptq"].call(w[:9], fmt, hessian, factors=factors)[0], expected[1])


@pytest.mark.parametrize("name", ["int4-asym-g64", "e2m1-row", "nvfp4"])
def test_gptq_with_clip_beats_gptq_without(name):
    w, x = problem(3)
    hessian = x.T @ x / len(x)
    plain, clipped = (
        SOLVERS["gptq"].call(w, FORMATS[name], hessian, clip=c)[0] for c in (False, True)
    )
    assert objective(w, clipped, hessian) < objective(w, plain, hessian)


@pytest.mark.parametrize(
    ("name", "n", "k"),
    [
        ("int4-asym-g128", 7, 1152),
        ("vq-256x4", 33, 1152),
        ("lut4-g64", 7, 1152),
        ("nvfp4", 7, 1152),
        ("int3-2l-g64", 5, 2240),
        ("trit-row", 5, 2240),
        ("vq-64x2", 5, 2240),
    ],
)
def test_gptq_at_widths_that_blocks_do_not_divide(name, n, k):
    """2240 is 17.5 blocks of 128; rows are odd."""
    w, x = problem(0, rows=300, n=n, k=k)
    hessian = x.T @ x / len(x)
    fmt = FORMATS[name]
    fmt.tensor_specs(w.shape)
    w_q, params = SOLVERS["gptq"].call(w, fmt, hessian)
    check_representable(fmt, w_q, params)
    assert objective(w, w_q, hessian) < objective(w, SOLVERS["rtn"].call(w, fmt)[0], hessian)


@SOME
@pytest.mark.parametrize("block", [16, 96, 1000])
def test_blocks_change_rounding_errors_only(name, block):
    w, x = problem()
    hessian = x.T @ x / len(x)
    default, other = (
        objective(w, SOLVERS["gptq"].call(w, FORMATS[name], hessian, block=b)[0], hessian)
        for b in (128, block)
    )
    assert other == pytest.approx(default, rel=0.02)


@SOME
def test_gptq_survives_singular_moments_and_dead_inputs(name):
    w, x = problem(0, rows=40)  # rank 40 of 256
    x = x.clone()  # the problem is shared
    x[:, 7] = 0
    x[:, 64:128] = 0  # a whole group
    fmt = FORMATS[name]
    hessian = x.T @ x / 40
    w_q, params = SOLVERS["gptq"].call(w, fmt, hessian)
    check_representable(fmt, w_q, params)
    assert objective(w, w_q, hessian) < objective(w, SOLVERS["rtn"].call(w, fmt)[0], hessian)
    dead, _ = SOLVERS["gptq"].call(w, fmt, torch.zeros(K, K))
    assert torch.isfinite(dead).all()


def test_damping_is_raised_until_the_moment_factors(caplog):
    w, x = problem(0, rows=40)
    hessian = x.T @ x / 40
    hessian = hessian - 0.02 * hessian.diagonal().mean() * torch.eye(K)  # slightly indefinite
    with caplog.at_level(logging.INFO, "dtq"):
        w_q, _ = SOLVERS["gptq"].call(w, FORMATS["int4-g64"], hessian)
    assert "damping raised" in caplog.text
    assert torch.isfinite(w_q).all()
    no_moment = torch.eye(K) - 1e6 * (1 - torch.eye(K))
    with pytest.raises(InputError, match="not positive definite"):
        SOLVERS["gptq"].call(w, FORMATS["int4-g64"], no_moment)


def test_nvfp4_keeps_the_scale_of_the_matrix():
    w, x = problem()
    for name in ("nvfp4", "nvfp4-46"):
        _, params = SOLVERS["gptq"].call(w, FORMATS[name], x.T @ x / len(x))
        assert torch.equal(
            params["weight_scale_2"], FORMATS[name].compute_qparams(w)["weight_scale_2"]
        )


def test_vectors_are_quantized_together():
    """Every vector of the result is a codeword, the nearest to its compensated columns."""
    w, x = problem()
    fmt = FORMATS["vq-256x4"]
    w_q, params = SOLVERS["gptq"].call(w, fmt, x.T @ x / len(x))
    codewords = {tuple(word) for word in params["weight_lut"].float().tolist()}
    assert {tuple(v) for v in w_q.reshape(-1, 4).tolist()} <= codewords
    assert not torch.equal(w_q, fmt.fake_quantize(w, params))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(solver, bad):
    w, _ = problem()
    broken = w.clone()
    broken[3, 5:7] = bad
    with pytest.raises(InputError, match=re.escape("the weight has 2 entries")):
        SOLVERS[solver].call(broken, FORMATS["int4-row"], torch.eye(K))
    if solver == "rtn":  # it does not use the Hessian
        return
    hessian = torch.eye(K)
    hessian[3, 3] = bad
    with pytest.raises(InputError, match="calibration saw of the input has 1 entries"):
        SOLVERS[solver].call(w, FORMATS["int4-row"], hessian)


def test_a_factor_in_float32_compensates_as_much_as_one_in_float64(monkeypatch):
    w, x = problem(7)
    x = x * torch.where(torch.arange(K) % 50 == 0, 100.0, 1.0)
    hessian, fmt = x.T @ x / len(x), FORMATS["int4-2l-g64"]
    narrow = objective(w, SOLVERS["gptq"].call(w, fmt, hessian)[0], hessian)
    monkeypatch.setattr(cholesky, "_WIDE", K - 1)
    dtypes = []
    factor = cholesky._reversed_factor
    monkeypatch.setattr(cholesky, "_reversed_factor", lambda *a: dtypes.append(a[-1]) or factor(*a))
    wide = objective(w, SOLVERS["gptq"].call(w, fmt, hessian)[0], hessian)
    assert dtypes == [torch.float32]
    assert wide == pytest.approx(narrow, rel=0.02)
    # what float32 cannot factor float64 can, without more damping
    monkeypatch.setattr(
        cholesky,
        "_reversed_factor",
        lambda h, damping, dtype: factor(h, damping, dtype) if dtype.itemsize > 4 else None,
    )
    again = objective(w, SOLVERS["gptq"].call(w, fmt, hessian)[0], hessian)
    assert again == pytest.approx(narrow, rel=1e-6)


def test_error_feedback_trusts_a_hessian_of_few_rows_less():
    """The error is that on held-out rows; of many rows the Hessian stays as it is, to the bit."""
    w, x = problem(rows=6000)
    few, held_out = x[: K // 2], x[K // 2 :]
    truth = held_out.T @ held_out
    plan = LayerPlan("it", "ffn.up", tuple(w.shape), LayerSpec("int4-2l-g64", "none"))
    plan = replace(plan, solver=MethodSpec("gptq"))
    none = TRANSFORMS["none"].call([w], None, fmt=None, activations=None)

    def given(rows, ridge=RIDGE):
        stats = InputStats(K, 1, frozenset({"channels", "hessian"}))
        for i, part in enumerate(rows.split(512)):
            zeros = torch.zeros(len(part), dtype=torch.int64)
            stats.observe(part, SampleOrigin(0, i, zeros))
        return TransformedInput(stats, none, ACTIVATION_FORMATS["none"], w, False, ridge)

    def error(ridge):
        solved = solve_layer(plan, w, given(few, ridge))
        return objective(w, FORMATS["int4-2l-g64"].unpack(solved.tensors), truth)

    assert error(RIDGE) < 0.8 * error(0.0)
    many = given(x)
    assert many.ridged_hessian is many.hessian
