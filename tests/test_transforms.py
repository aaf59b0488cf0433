# SPDX-License-Identifier: Apache-2.0
"""Transforms cancel, also in statistics; the search is never worse than its parts."""

from __future__ import annotations

import pytest
import torch

from dtq.calibrate.stats import Origin, SiteStats
from dtq.formats import FORMATS
from dtq.formats.acts import ACTS
from dtq.transforms import TRANSFORMS, Chain, Diagonal, Online, Rotation
from dtq.transforms.hadamard import block_for, fwht, signs

K = 192


def salient(rows: int = 2048, seed: int = 0) -> torch.Tensor:
    """Rows with a few large channels, the picture the papers draw of a DiT's inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=g) * torch.exp(0.5 * torch.randn(K, generator=g))
    x[:, torch.randperm(K, generator=g)[:5]] *= 40
    return x


def stats_of(x: torch.Tensor, bins: int = 4) -> SiteStats:
    stats = SiteStats(x.shape[1], bins, frozenset({"channels", "gram", "reservoir"}))
    for call, chunk in enumerate(x.split(256)):
        stats.see(chunk, Origin(call % bins, call, torch.zeros(len(chunk), dtype=torch.int64)))
    return stats


def some_transforms():
    g = torch.Generator().manual_seed(1)
    s = torch.exp(torch.randn(K, generator=g))
    return {
        "diagonal": Diagonal(s),
        "rotation": Rotation(64),
        "chain": Chain((Diagonal(s), Rotation(16), Diagonal(s.flip(0)))),
        "empty": Chain(),
        "online": Online.of(s, signs(K, 3), 64),
    }


@pytest.mark.parametrize("name", some_transforms())
def test_a_transform_cancels_and_carries_the_second_moment(name):
    t = some_transforms()[name]
    g = torch.Generator().manual_seed(2)
    x, w = torch.randn(50, K, generator=g).double(), torch.randn(30, K, generator=g).double()
    torch.testing.assert_close(t.x(x) @ t.w(w).T, x @ w.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(t.gram(x.T @ x), t.x(x).T @ t.x(x), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("block", [1, 2, 16, 64])
def test_fwht_is_orthonormal_symmetric_and_independent_of_the_batch(block):
    x = torch.randn(5, K)
    assert torch.allclose(fwht(fwht(x, block), block), x, atol=1e-5)
    matrix = fwht(torch.eye(K, dtype=torch.float64), block)
    assert torch.allclose(matrix @ matrix.T, torch.eye(K, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(torch.stack([fwht(row, block) for row in x]), fwht(x, block))


def test_blocks_and_signs():
    assert [block_for(k) for k in (1152, 2240, 96, 30, 7)] == [64, 64, 32, 2, 1]
    assert torch.equal(signs(64, 5), signs(128, 5)[:64])
    assert signs(4096, 0).mean().abs() < 0.05
    assert signs(8, 0).tolist() == GOLDEN_SIGNS


GOLDEN_SIGNS = [1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0]  # a file written today must load tomorrow


@pytest.mark.parametrize("fmt", ["int4-2l-g64", "int4-row", "int8-row"])
def test_search_is_never_worse_than_none_smoothing_or_rotation_alone(fmt):
    x = salient()
    stats = stats_of(x)
    g = torch.Generator().manual_seed(4)
    weights = [torch.randn(n, K, generator=g) * 0.05 for n in (128, 128, 64)]
    how = {"fmt": FORMATS[fmt], "acts": ACTS["int8-row"]}
    found = TRANSFORMS["search"].call(weights, stats, **how)
    assert set(found.errors) == {"none", "smooth", "hadamard", "smooth + hadamard"}

    from dtq.transforms.methods import _Judge

    judge = _Judge(weights, stats, how["fmt"], how["acts"], 1024)
    best = judge(found.transform)
    assert best == pytest.approx(min(found.errors.values()))
    for name in ("none", "hadamard"):
        assert best <= judge(TRANSFORMS[name].call(weights, stats, **how).transform)
    for alpha in (0.0, 0.3, 0.5, 0.8, 1.0):
        assert best <= judge(
            TRANSFORMS["smooth"].call(weights, stats, alpha=alpha, **how).transform
        )


def test_smoothing_and_rotation_together_beat_each_alone_on_salient_inputs():
    stats = stats_of(salient())
    w = torch.randn(256, K, generator=torch.Generator().manual_seed(5)) * 0.05
    found = TRANSFORMS["search"].call([w], stats, fmt=FORMATS["int4-row"], acts=ACTS["int8-row"])
    alone = min(found.errors["smooth"], found.errors["hadamard"], found.errors["none"])
    assert found.errors["smooth + hadamard"] <= 0.7 * alone


def test_search_is_deterministic():
    stats = stats_of(salient())
    w = torch.randn(64, K, generator=torch.Generator().manual_seed(6))
    how = {"fmt": FORMATS["int4-2l-g64"], "acts": ACTS["int8-row"]}
    a, b = (TRANSFORMS["search"].call([w], stats, **how) for _ in range(2))
    assert a.label == b.label
    assert torch.equal(a.transform.scale, b.transform.scale)
