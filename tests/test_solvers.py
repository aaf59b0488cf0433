# SPDX-License-Identifier: Apache-2.0
"""A solver's result is representable and, on its own objective, never worse than rounding."""

from __future__ import annotations

import pytest
import torch

from dtq.formats import FORMATS
from dtq.solvers import SOLVERS

K = 256
PAIRS = pytest.mark.parametrize("solver", SOLVERS)
ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


def problem(seed: int = 0, rows: int = 2000):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=g) * 0.4 + torch.eye(K)
    x = torch.randn(rows, K, generator=g) * torch.exp(0.6 * torch.randn(K, generator=g)) @ mix
    w = torch.randn(48, K, generator=g) * 0.05
    return w, x


def objective(w, snapped, gram):
    d = (snapped - w).double()
    return float((d @ gram.double() * d).sum())


@ALL
@PAIRS
def test_the_result_is_representable(fmt, solver):
    w, x = problem()
    snapped, params = SOLVERS[solver].call(w, fmt, x.T @ x / len(x))
    assert torch.equal(fmt.snap(snapped, params), snapped)
    assert torch.equal(fmt.unpack(fmt.pack(snapped, params)), snapped)


@ALL
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gptq_beats_clip_search_beats_rounding(fmt, seed):
    w, x = problem(seed)
    gram = x[:1500].T @ x[:1500] / 1500
    held = x[1500:].T @ x[1500:] / 500
    result = {name: SOLVERS[name].call(w, fmt, gram)[0] for name in SOLVERS}
    diagonal = {n: objective(w, r, gram.diagonal().diag()) for n, r in result.items()}
    assert diagonal["search"] <= diagonal["rtn"]
    error = {n: objective(w, r, gram) for n, r in result.items()}
    # an 8-bit grid is so fine that group scales in bfloat16 decide; 4 bits must win clearly
    assert error["gptq"] <= error["rtn"] * (0.8 if fmt.name.startswith("int4") else 1.0)
    fresh = {n: objective(w, r, held) for n, r in result.items()}
    assert fresh["gptq"] <= fresh["rtn"]


@ALL
def test_gptq_on_the_identity_is_clip_search(fmt):
    w, _ = problem()
    assert torch.equal(
        SOLVERS["gptq"].call(w, fmt, torch.eye(K))[0], SOLVERS["search"].call(w, fmt, None)[0]
    )


def test_gptq_with_clip_beats_gptq_without():
    w, x = problem(3)
    gram = x.T @ x / len(x)
    fmt = FORMATS["int4-asym-g64"]
    plain, clipped = (SOLVERS["gptq"].call(w, fmt, gram, clip=c)[0] for c in (False, True))
    assert objective(w, clipped, gram) < objective(w, plain, gram)


def test_gptq_survives_singular_moments_and_dead_inputs():
    w, x = problem(0, rows=40)  # rank 40 of 256
    x[:, 7] = 0
    snapped, _ = SOLVERS["gptq"].call(w, FORMATS["int4-2l-g64"], x.T @ x / 40)
    assert torch.isfinite(snapped).all()
    assert (snapped - w).norm() < 0.7 * w.norm()


def test_gptq_refuses_broken_moments():
    w, _ = problem()
    gram = torch.eye(K)
    gram[3, 3] = torch.nan
    with pytest.raises(ValueError, match="second moment"):
        SOLVERS["gptq"].call(w, FORMATS["int4-row"], gram)
