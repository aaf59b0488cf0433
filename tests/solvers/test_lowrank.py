# SPDX-License-Identifier: Apache-2.0
"""Low-rank branches: exact when full, never worse with rank or rounds, the same on the raw input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F

import dtq
from dtq.calibrate.observers import InputStats, SampleOrigin
from dtq.formats import FORMATS, bits_per_weight
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io.schema import MethodSpec
from dtq.linalg.hadamard import fwht
from dtq.nn.linear import QuantLinear
from dtq.plan.layers import LayerPlan, LayerSpec
from dtq.recipe import Recipe
from dtq.solvers import SOLVERS
from dtq.solvers.lowrank import LOWRANK, loftq, rank_for, svd
from dtq.stages.solve_input import solve_input_group
from dtq.stages.solve_layer import TransformedInput
from dtq.transforms import TRANSFORMS

K, N = 128, 96
FMT = FORMATS["int4-g64"]


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight with salient columns, input rows with salient channels, their second moment."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=g) * torch.exp(0.6 * torch.randn(K, generator=g)) * 0.05
    x = torch.randn(1024, K, generator=g) * torch.exp(0.8 * torch.randn(K, generator=g))
    return w, x, x.T @ x / len(x)


def missed(w, branch, hessian) -> float:
    """Output error of branch and rounded residual together."""
    w_q = SOLVERS["search"].call(w - branch.matrix(), FMT, hessian)[0]
    d = w - branch.matrix() - w_q
    return float(((d @ hessian) * d).sum())


def test_full_rank_leaves_nothing_but_the_rounding_of_its_factors():
    w, _, _ = layer()
    (branch,) = svd([w], FMT, None, rank=N)
    assert (w - branch.matrix()).norm() < 0.02 * w.norm()


def test_a_recipe_collects_what_its_branch_reads():
    without = {"transform": "none", "solver": "rtn", "promote": {"to": ""}, "correct_bias": False}
    for name, row in LOWRANK.items():
        assert Recipe.load("w4a16", lowrank=name, **without).needs() == row.needs
    rule = {"rules": [{"match": "ffn.up", "lowrank": "svd"}]}
    assert Recipe.load("w4a16", **rule, **without).needs() == {"hessian"}


@pytest.mark.parametrize("name", LOWRANK)
def test_a_branch_lowers_the_error(name):
    w, _, hessian = layer()
    (branch,) = LOWRANK[name].call([w], FMT, hessian, rank=8)
    nothing = SOLVERS["search"].call(w, FMT, hessian)[0] - w
    assert missed(w, branch, hessian) < float(((nothing @ hessian) * nothing).sum())


def test_more_rank_and_more_rounds_are_never_worse():
    w, _, hessian = layer()
    by_rank = [missed(w, svd([w], FMT, hessian, rank=r)[0], hessian) for r in (2, 8, 32)]
    assert by_rank[0] > by_rank[1] > by_rank[2]
    by_round = [
        missed(w, svd([w], FMT, hessian, rank=8, iterations=i)[0], hessian) for i in (0, 2, 8)
    ]
    assert by_round[0] >= by_round[1] >= by_round[2]
    nothing = SOLVERS["search"].call(w, FMT, hessian)[0] - w
    assert by_rank[0] < float(((nothing @ hessian) * nothing).sum())


def test_decomposing_first_beats_quantizing_first():
    for seed in range(3):
        w, _, _ = layer(seed)
        eye = torch.eye(K)
        first = missed(w, svd([w], FMT, None, rank=16, iterations=0)[0], eye)
        after = missed(w, loftq([w], FMT, None, rank=16, iterations=1)[0], eye)
        assert first < after


def test_the_metric_of_the_input_helps_the_output():
    for seed in range(3):
        w, x, _ = layer(seed)
        w, x = fwht(w, 64), fwht(x, 64)
        hessian = x.T @ x / len(x)
        plain = missed(w, svd([w], FMT, hessian, rank=8, weighted=False)[0], hessian)
        assert missed(w, svd([w], FMT, hessian, rank=8)[0], hessian) < plain


def test_weights_that_share_the_down_projection_share_it():
    weights = [layer(seed)[0] for seed in range(3)]
    branches = svd(weights, FMT, layer()[2], rank=8, share=True)
    assert all(torch.equal(b.down, branches[0].down) for b in branches)
    assert [b.up.shape for b in branches] == [(N, 8)] * 3
    alone = svd(weights, FMT, layer()[2], rank=8)
    assert not torch.equal(alone[0].down, alone[1].down)


def test_bits_set_the_rank_by_the_shape():
    assert rank_for((3072, 3072), {"bits": 1 / 3}) == 32  # SVDQuant's rank on FLUX
    assert rank_for((256, 256), {"bits": 0.5}) == 4
    assert rank_for((8, 8), {"rank": 32}) == 8
    for shape in ((256, 1024), (96, 128)):
        r = rank_for(shape, {"bits": 0.5})
        assert 16 * r * sum(shape) / (shape[0] * shape[1]) <= 0.5 or r == 1


@pytest.mark.parametrize("transform", ["none", "smooth-hadamard", "ars"])
def test_a_layer_runs_the_branch_on_the_raw_input_and_counts_its_bytes(transform):
    w, x, _ = layer()
    stats = InputStats(K, 2, frozenset({"channels", "hessian", "sample"}))
    for call, rows in enumerate(x.split(256)):
        stats.observe(rows, SampleOrigin(call % 2, call, torch.zeros(len(rows), dtype=torch.int64)))
    plan = LayerPlan(
        "it", "ffn.up", (N, K), LayerSpec("int4-g64", "none", pre_quant=transform != "none"),
        transform=MethodSpec(transform), solver=MethodSpec("gptq"), lowrank=MethodSpec("svd", (("rank", 8),)),
    )  # fmt: skip
    choice = TRANSFORMS[transform].call([w], stats, fmt=FMT, activations=ACTIVATION_FORMATS["none"])
    x_q = TransformedInput(stats, choice, ACTIVATION_FORMATS["none"], w, correct_bias=False)
    (solved,) = solve_input_group([plan], [w], x_q, {})
    assert solved.plan.spec.rank == 8
    bits = bits_per_weight(FMT, (N, K)) + 16 * 8 * (N + K) / (N * K)
    bits += 16 / N * solved.plan.spec.pre_quant + 32 / N * solved.plan.spec.permutation
    assert solved.report.bits == pytest.approx(bits)
    new = QuantLinear(K, N, False, solved.plan.spec)
    new.fill(solved.tensors)
    torch.testing.assert_close(new(x), x @ new.dequantize().T, rtol=1e-3, atol=1e-3)
    error = (new(x) - x @ w.T).square().sum() / (x @ w.T).square().sum()
    assert error == pytest.approx(solved.report.error, rel=0.1)
    (bare,) = solve_input_group([replace(plan, lowrank=MethodSpec("none"))], [w], x_q, {})
    assert solved.report.error < bare.report.error


def test_a_kernel_that_can_adds_the_branch(monkeypatch):
    from dtq.nn import linear as module

    torch.manual_seed(0)
    model = dtq.quantize(tiny.dit(), "rtn-w4a8", progress=False).bfloat16()
    layer = next(
        m for m in model.modules() if isinstance(m, QuantLinear) and m.kernel.with_epilogue
    )
    x = torch.randn(2, 24, layer.in_features).bfloat16()
    down, up = torch.randn(16, layer.in_features) * 0.1, torch.randn(layer.out_features, 16) * 0.1
    with torch.no_grad():
        plain = layer(x)
        layer.add_rank(down, up)
        apart = layer(x)
        ranks = []
        monkeypatch.setattr(module, "branch_joins", lambda x, rank: ranks.append(rank) or True)
        joined, activated = layer(x), layer.gelu(x)
    assert ranks == [16, 16]
    assert not torch.allclose(apart, plain, rtol=0.1, atol=0.1)
    torch.testing.assert_close(joined, apart, rtol=2**-6, atol=2**-5)
    expected = F.gelu(apart.float(), approximate="tanh")
    torch.testing.assert_close(activated.float(), expected, rtol=2**-5, atol=2**-5)
