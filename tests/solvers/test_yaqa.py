# SPDX-License-Identifier: Apache-2.0
"""Feedback between output channels lowers ``tr(G D H D^T)`` and the error of a model."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import tiny
import torch

import dtq
from dtq.errors import InputError
from dtq.formats import FORMATS, bits_per_weight
from dtq.linalg.relative_error import relative_error
from dtq.pipelines.recorded_calls import first_tensor
from dtq.pipelines.tracing import dummy_inputs
from dtq.solvers.gptq import gptq
from dtq.solvers.yaqa import yaqa

K, N = 256, 90
SOME = pytest.mark.parametrize(
    "name", ["int4-2l-g64", "int3-row", "nvfp4", "lut4-2l-g16", "vq-64x2"]
)


@cache
def problem(n=N):
    """Weight, Hessian, and G of the gradients of some rows and of others."""
    g = torch.Generator().manual_seed(0)

    def correlated(width, rows):
        mix = torch.randn(width, width, generator=g) * 0.5 + torch.eye(width)
        scale = torch.exp(0.6 * torch.randn(width, generator=g))
        return torch.randn(rows, width, generator=g) * scale @ mix

    x, y = correlated(K, 2000), correlated(n, 4000)
    moments = [rows.T @ rows / len(rows) for rows in (x, y[:2000], y[2000:])]
    return torch.randn(n, K, generator=g) * 0.05, *moments


def objective(w, w_q, hessian, g):
    d = (w_q - w).double()
    return float(((g.double() @ d) * (d @ hessian.double())).sum())


def parts(g, count):
    return [g[i::count, i::count] for i in range(count)]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_it_beats_gptq(fmt):
    w, hessian, g, fresh = problem()
    plain, _ = gptq(w, fmt, hessian)
    w_q, params = yaqa(w, fmt, hessian, gradients=[g])
    assert torch.equal(fmt.fake_quantize(w_q, params), w_q)
    assert torch.equal(fmt.unpack(fmt.pack(w_q, params)), w_q)
    coarse = bits_per_weight(fmt, (1152, 2304)) < 3
    for moment in (g, fresh):  # of gradients that it has not seen, too
        less = objective(w, w_q, hessian, moment) / objective(w, plain, hessian, moment)
        assert less < (0.75 if coarse else 0.6)


@SOME
def test_blocks_of_outputs_are_independent(name):
    w, hessian, g, _ = problem()
    fmt = FORMATS[name]
    errors = [
        objective(w, yaqa(w, fmt, hessian, gradients=parts(g, count))[0], hessian, g)
        for count in (1, 2, 3)
    ]
    assert errors[0] < errors[1] < objective(w, gptq(w, fmt, hessian)[0], hessian, g)
    assert errors[0] < errors[2] < objective(w, gptq(w, fmt, hessian)[0], hessian, g)
    if not fmt.matrix_tensors:  # then the rows of a block are solved as they are alone
        apart = yaqa(w[1::3], fmt, hessian, gradients=parts(g, 3)[1:2])[0]
        together = yaqa(w, fmt, hessian, gradients=parts(g, 3))[0][1::3]
        assert (apart != together).float().mean() < 0.01  # sums of another order


@SOME
def test_without_gradients_or_data_it_is_gptq(name):
    w, hessian, g, _ = problem()
    fmt = FORMATS[name]
    assert torch.equal(yaqa(w, fmt, hessian)[0], gptq(w, fmt, hessian)[0])
    assert torch.equal(yaqa(w, fmt, gradients=[g])[0], gptq(w, fmt)[0])


@SOME
def test_uncorrelated_outputs_are_rounded_as_by_gptq(name):
    w, hessian, g, _ = problem()
    fmt = FORMATS[name]
    w_q = yaqa(w, fmt, hessian, gradients=[g.diagonal().diag()])[0]
    assert (w_q != gptq(w, fmt, hessian)[0]).float().mean() < 0.01


@pytest.mark.parametrize("rows", [1, 5, 9])
def test_few_rows(rows):
    w, hessian, g, _ = problem()
    fmt = FORMATS["int4-2l-g64"]
    w, g = w[:rows], g[:rows, :rows]
    w_q, params = yaqa(w, fmt, hessian, gradients=[g])
    assert torch.equal(fmt.fake_quantize(w_q, params), w_q)
    assert objective(w, w_q, hessian, g) <= objective(w, gptq(w, fmt, hessian)[0], hessian, g)


def test_outputs_without_gradients_do_not_disturb_the_others():
    w, hessian, g, _ = problem()
    fmt, g = FORMATS["int4-2l-g64"], g.clone()
    g[:9] = g[:, :9] = 0
    w_q = yaqa(w, fmt, hessian, gradients=[g])[0]
    assert w_q.isfinite().all()
    assert objective(w, w_q, hessian, g) < 0.6 * objective(w, gptq(w, fmt, hessian)[0], hessian, g)


def test_bad_gradients_are_refused():
    w, hessian, g, _ = problem()
    fmt = FORMATS["int4-2l-g64"]
    with pytest.raises(ValueError, match="blocks of G with 30, 30 rows for a weight with 90"):
        yaqa(w, fmt, hessian, gradients=parts(g, 3)[:2])
    broken = g.clone()
    broken[3, 4] = torch.nan
    with pytest.raises(InputError, match="1 entries that are NaN"):
        yaqa(w, fmt, hessian, gradients=[broken])


def test_the_output_of_a_model_has_less_error():
    """Only the solver differs; inputs of the test are not those of the calibration."""
    model = tiny.dit(blocks=4)
    inputs = [dummy_inputs(model, 4, 1000.0 - 30 * i, i) for i in range(32)]
    fresh = [dummy_inputs(model, 4, 970.0 - 120 * i, 100 + i) for i in range(8)]
    errors = {}
    for solver in ("gptq", "yaqa"):
        quantized = dtq.quantize(
            copy.deepcopy(model), "w4a16", inputs=inputs, progress=False, sanity_check=False,
            weights="int4-2l-g64", modulation="keep", solver=solver,
        )  # fmt: skip
        with torch.no_grad():
            outs = [(first_tensor(quantized(**x)), first_tensor(model(**x))) for x in fresh]
        errors[solver] = sum(relative_error(*pair) for pair in outs) / len(outs)
    assert errors["yaqa"] < 0.9 * errors["gptq"]
