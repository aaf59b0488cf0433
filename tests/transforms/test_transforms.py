# SPDX-License-Identifier: Apache-2.0
"""Transforms cancel, also in statistics; the search is never worse than its candidates."""

from __future__ import annotations

import math

import pytest
import torch

from dtq.calibrate.observers import InputStats, SampleOrigin
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.linalg.hadamard import block_for, fwht, rotate, rotate_back, signs
from dtq.models import InputGroup, Linear
from dtq.stages.transform_choice import input_report
from dtq.transforms import TRANSFORMS, OnlineTransform
from dtq.transforms.choice import TransformChoice, online_transform
from dtq.transforms.methods import incoherence, zigzag
from dtq.transforms.objective import OutputErrorObjective, search_format
from dtq.transforms.smoothing import REDUCTIONS, smoothing

K = 192


def salient(rows: int = 2048, seed: int = 0) -> torch.Tensor:
    """Rows with a few large channels, as the papers report of a DiT's inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=g) * torch.exp(0.5 * torch.randn(K, generator=g))
    x[:, torch.randperm(K, generator=g)[:5]] *= 40
    return x


def stats_of(x: torch.Tensor, bins: int = 4) -> InputStats:
    stats = InputStats(x.shape[1], bins, frozenset({"channels", "hessian", "sample"}))
    for call, chunk in enumerate(x.split(256)):
        stats.observe(
            chunk, SampleOrigin(call % bins, call, torch.zeros(len(chunk), dtype=torch.int64))
        )
    return stats


def formats(weight: str) -> dict:
    """Keywords of every method."""
    return {"fmt": FORMATS[weight], "activations": ACTIVATION_FORMATS["int8-row"]}


def some_transforms():
    g = torch.Generator().manual_seed(1)
    s, ones = torch.exp(torch.randn(K, generator=g)), torch.ones(K)
    return {
        "diagonal": OnlineTransform(s, 1),
        "rotation": OnlineTransform(ones, 64),
        "none": OnlineTransform(ones, 1),
        "online": online_transform(torch.ones(1, K), s, 64, 3),
        "permutation": OnlineTransform(ones, 1, torch.randperm(K, generator=g)),
        "dual": OnlineTransform(ones, 16, num_rotations=2),
        "online dual": online_transform(
            torch.ones(1, K), s, 64, 3, torch.randperm(K, generator=g), num_rotations=2
        ),
    }


@pytest.mark.parametrize("name", some_transforms())
def test_a_transform_cancels_and_carries_the_hessian(name):
    t = some_transforms()[name]
    g = torch.Generator().manual_seed(2)
    x, w = torch.randn(50, K, generator=g).double(), torch.randn(30, K, generator=g).double()
    torch.testing.assert_close(t.x(x) @ t.w(w).T, x @ w.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(t.hessian(x.T @ x), t.x(x).T @ t.x(x), rtol=1e-10, atol=1e-9)


def test_rows_for_the_transformed_input_become_rows_for_the_raw_one():
    g = torch.Generator().manual_seed(2)
    x, v = torch.randn(50, K, generator=g).double(), torch.randn(4, K, generator=g).double()
    for name in ("online", "online dual"):
        t = some_transforms()[name]
        torch.testing.assert_close(x @ t.raw(v).T, t.x(x) @ v.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [16, 64])
def test_two_rotations_spread_one_channel_over_every_block_and_can_be_undone(block):
    x = torch.randn(5, 256, dtype=torch.float64)
    rotated = rotate(x, block, num_rotations=2)
    assert torch.allclose(rotate_back(rotated, block, num_rotations=2), x)
    assert not torch.allclose(rotate_back(rotated, block), x)
    one = torch.zeros(1, 256)
    one[0, 100] = 1
    energy = rotate(one, block, num_rotations=2).square().reshape(-1, block).sum(1)
    assert torch.allclose(energy, torch.full_like(energy, block / 256))


def test_zigzag_gives_every_block_as_many_outliers():
    amax = torch.ones(256)
    amax[:8] = torch.arange(8, 0, -1) * 10.0  # all in the first block
    perm = zigzag(amax, 64)
    assert sorted(perm.tolist()) == list(range(256))
    assert amax[perm].reshape(4, 64).gt(1).sum(1).tolist() == [2, 2, 2, 2]
    sums = amax[perm].reshape(4, 64).sum(1)
    assert sums.max() == sums.min()  # back and forth: 8 + 1, 7 + 2, ...


@pytest.mark.parametrize("block", [1, 2, 16, 64])
def test_fwht_is_orthonormal_symmetric_and_independent_of_the_batch(block):
    x = torch.randn(5, K)
    assert torch.allclose(fwht(fwht(x, block), block), x, atol=1e-5)
    matrix = fwht(torch.eye(K, dtype=torch.float64), block)
    assert torch.allclose(matrix @ matrix.T, torch.eye(K, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(torch.stack([fwht(row, block) for row in x]), fwht(x, block))


@pytest.mark.parametrize("shape", [(1, 64), (64,), (3, 2**17), (0, 64)])
def test_a_transform_of_any_size_leaves_its_input_alone(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    rotated = fwht(x, shape[-1])
    assert torch.equal(x, before)
    assert rotated.shape == x.shape
    torch.testing.assert_close(fwht(rotated, shape[-1]), x)
    assert shape[0] == 0 or not torch.allclose(rotated, x)


def test_blocks_and_signs():
    assert [block_for(k) for k in (1152, 2240, 96, 30, 7)] == [64, 64, 32, 2, 1]
    assert torch.equal(signs(64, 5), signs(128, 5)[:64])
    assert signs(4096, 0).mean().abs() < 0.05
    assert signs(8, 0).tolist() == GOLDEN_SIGNS


GOLDEN_SIGNS = [1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0]  # a file written today must load tomorrow


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_table_has_what_a_method_needs_and_whether_it_rotates(name):
    row, stats = TRANSFORMS[name], stats_of(salient())
    w = torch.randn(64, K, generator=torch.Generator().manual_seed(4)) * 0.05
    best = row.call([w], stats if row.needs else None, **formats("int4-row"))
    choices = (best, *best.runner_ups)
    assert row.rotates == any(choice.transform.block > 1 for choice in choices)


@pytest.mark.parametrize("fmt", ["int4-2l-g64", "int4-row", "int8-row"])
def test_search_is_never_worse_than_none_smoothing_or_rotation_alone(fmt):
    stats, args = stats_of(salient()), formats(fmt)
    g = torch.Generator().manual_seed(4)
    weights = [torch.randn(n, K, generator=g) * 0.05 for n in (128, 128, 64)]
    choice = TRANSFORMS["search"].call(weights, stats, **args)
    assert set(choice.errors) == {"none", "smooth", "hadamard", "smooth + hadamard"}
    objective = OutputErrorObjective(weights, stats, *args.values(), 512)
    best = objective(choice.transform)
    assert best == pytest.approx(min(choice.errors.values()))
    for name in ("none", "hadamard"):
        assert best <= objective(TRANSFORMS[name].call(weights, stats, **args).transform)
    for alpha in (0.0, 0.3, 0.5, 0.8, 1.0):
        other = TRANSFORMS["smooth"].call(weights, stats, alpha=alpha, **args)
        assert best <= objective(other.transform)


def test_smoothing_and_rotation_together_beat_each_alone_on_salient_inputs():
    stats = stats_of(salient())
    w = torch.randn(256, K, generator=torch.Generator().manual_seed(5)) * 0.05
    errors = TRANSFORMS["search"].call([w], stats, **formats("int4-row")).errors
    alone = min(errors["smooth"], errors["hadamard"], errors["none"])
    assert errors["smooth + hadamard"] <= 0.7 * alone


def test_search_on_some_channels_finds_what_the_search_on_all_finds_nearly():
    stats, args = stats_of(salient()), formats("int4-2l-g64")
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(n, K, generator=g) * 0.05 for n in (512, 96)]
    whole, few, more = (
        TRANSFORMS["search"].call(weights, stats, num_channels=n, **args) for n in (512, 64, 9999)
    )
    assert torch.equal(whole.transform.scale, more.transform.scale)
    objective = OutputErrorObjective(weights, stats, *args.values(), 512)
    assert objective(few.transform) <= 1.02 * objective(whole.transform)
    assert few.errors != whole.errors


def test_search_is_deterministic():
    stats = stats_of(salient())
    w = torch.randn(64, K, generator=torch.Generator().manual_seed(6))
    a, b = (TRANSFORMS["search"].call([w], stats, **formats("int4-2l-g64")) for _ in range(2))
    assert a.label == b.label
    assert torch.equal(a.transform.scale, b.transform.scale)


def test_ditas_is_never_worse_than_no_smoothing_or_either_end_of_its_grid():
    stats, args = stats_of(salient()), formats("int4-row")
    w = torch.randn(128, K, generator=torch.Generator().manual_seed(7)) * 0.05
    choice = TRANSFORMS["ditas"].call([w], stats, **args)
    assert choice.errors["smooth"] < 0.5 * choice.errors["none"]
    objective = OutputErrorObjective([w], stats, *args.values(), 512)
    for alpha in (0.0, 0.5, 1.0):
        s = TRANSFORMS["smooth"].call([w], stats, alpha=alpha, **args).transform
        assert objective(choice.transform) <= objective(s)


def test_ars_rotates_twice_only_where_one_hadamard_leaves_outliers_at_any_scale():
    args = formats("int4-row")
    w = torch.ones(8, K)
    calm = torch.randn(2048, K, generator=torch.Generator().manual_seed(8))
    # a different channel is large in every row: no fixed smoothing can help
    g = torch.Generator().manual_seed(9)
    wild = calm.scatter_add(
        1, torch.randint(0, K, (2048, 1), generator=g), torch.full((2048, 1), 300.0)
    )
    for factor in (1.0, 0.01):
        once = TRANSFORMS["ars"].call([w], stats_of(calm * factor), **args)
        assert once.transform.num_rotations == 1
        stats = stats_of(wild * factor)
        twice = TRANSFORMS["ars"].call([w], stats, block=8, **args)
        assert twice.transform.num_rotations == 2
        single = TRANSFORMS["smooth-hadamard"].call([w], stats, block=8, **args)
        assert incoherence(twice.transform.x(wild)) < 0.7 * incoherence(single.transform.x(wild))


def test_correlation_weighted_amax_prefers_timesteps_that_miss_the_large_weights():
    w = torch.arange(1.0, 65.0)
    along, against = w.clone(), w.flip(0)
    mixed = REDUCTIONS["ssc"](torch.stack([along, against]), w)
    fraction = (mixed - along) / (against - along)
    assert torch.allclose(fraction[w != 32.5], torch.tensor(math.e**2 / (1 + math.e**2)), atol=1e-4)


def test_balancing_with_half_gives_both_sides_the_geometric_mean():
    # PTQ4DiT, 2405.16005, eq. 8: after it the salience of input and weight agree, up to one factor
    x = salient()
    w = torch.randn(96, K, generator=torch.Generator().manual_seed(10)) * 0.05
    s = smoothing([w], stats_of(x), alpha=0.5)
    ratio = (x / s).abs().amax(0) / (w * s).abs().amax(0)
    assert ratio.max() / ratio.min() < 1.001


def test_candidates_are_compared_in_the_format_or_in_one_of_about_its_bits():
    w = torch.zeros(8, 128)
    names = ("int4-g64", "fp8-row", "fp8-matrix", "q8_0", "lut4-row", "vq-256x4")
    found = [search_format(FORMATS[name], w).name for name in names]
    assert found == ["int4-g64", "fp8-row", "fp8-matrix", "q8_0", "int4-g64", "int2-g64"]


def test_the_report_of_an_input_says_which_timestep_bins_it_has_rows_of():
    stats = InputStats(K, 4, frozenset({"channels", "sample"}))
    branch = torch.zeros(256, dtype=torch.int64)
    for b in (1, 3):  # one of two denoisers is not called in every bin
        stats.observe(salient(256), SampleOrigin(b, b, branch))
    group = InputGroup("x", (Linear("x", "ffn.up", (8, K), True),))
    transform = online_transform(torch.ones(1, K), None)
    report = input_report(group, stats, TransformChoice(transform, "none"), transform)
    assert report.bins == [2, 4]
    assert len(report.imbalance) == len(report.imbalance_after) == 2
