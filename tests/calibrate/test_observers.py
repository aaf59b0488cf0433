# SPDX-License-Identifier: Apache-2.0
"""Seeing A then B equals merging what saw A with what saw B; samples are fair and bounded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtq.calibrate import store
from dtq.calibrate.collection import Statistics
from dtq.calibrate.observers import (
    ChannelStats,
    HessianObserver,
    InputSample,
    InputStats,
    SampleOrigin,
)
from dtq.errors import CheckpointError, InputError

K, BINS = 24, 4
ALL = frozenset({"channels", "hessian", "sample"})


def calls(count=12, rows=64):
    g = torch.Generator().manual_seed(0)
    branch = torch.arange(rows) * 2 // rows
    return [
        (torch.randn(rows, K, generator=g), SampleOrigin(i % BINS, i, branch)) for i in range(count)
    ]


def seen(which) -> InputStats:
    stats = InputStats(K, BINS, ALL)
    for x, origin in which:
        stats.observe(x, origin)
    return stats


@pytest.mark.parametrize("split", [1, 5, 11])
def test_merging_equals_seeing_everything(split):
    every = calls()
    whole, parts = seen(every), seen(every[:split])
    parts.merge(seen(every[split:]))
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], tensor, rtol=1e-5, atol=1e-4, msg=name)


def test_the_order_of_the_parts_does_not_matter():
    every = calls()
    a, b = seen(every[6:]), seen(every)
    a.merge(seen(every[:6]))
    for name, tensor in b.tensors().items():
        torch.testing.assert_close(a.tensors()[name], tensor, rtol=1e-5, atol=1e-4, msg=name)


def test_channels_are_what_numpy_would_say():
    every = calls()
    c = ChannelStats(K, BINS)
    for x, origin in every:
        c.observe(x, origin)
    rows = torch.cat([x for x, _ in every])
    second = torch.cat([x for x, o in every if o.bin == 2])
    torch.testing.assert_close(c.mean(), rows.mean(0), atol=1e-6, rtol=1e-5)
    assert torch.equal(c.amax()[2], second.abs().amax(0))


def test_gram_of_all_rows_is_exact():
    every = calls()
    hessian = HessianObserver(K, per_call=1000)
    for x, origin in every:
        hessian.observe(x, origin)
    rows = torch.cat([x for x, _ in every])
    torch.testing.assert_close(hessian.hessian(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_gram_takes_at_most_its_share_of_a_call():
    hessian = HessianObserver(K, per_call=10)
    for x, origin in calls():
        hessian.observe(x, origin)
    assert 60 <= int(hessian.count) <= 120


def test_reservoir_is_bounded_and_stratified():
    sample = InputSample(K, BINS, capacity=80)
    for x, origin in calls(40):
        sample.observe(x, origin)
    counts = torch.bincount(sample.stratum, minlength=2 * BINS)
    assert counts.tolist() == [10] * (2 * BINS)
    everything = torch.cat([x for x, _ in calls(40)])
    assert all((everything == row).all(1).any() for row in sample.rows)


def test_statistics_survive_the_file(tmp_path):
    stats = Statistics({"a.b": seen(calls())}, (250.0, 500.0, 750.0), {"model": "x"})
    store.save(stats, tmp_path / "s.safetensors")
    back = store.load(tmp_path / "s.safetensors")
    assert back.edges == stats.edges
    assert back.about == stats.about
    for name, tensor in stats.inputs["a.b"].tensors().items():
        assert torch.equal(back.inputs["a.b"].tensors()[name], tensor)
    raw = (tmp_path / "s.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header["__metadata__"]) == ["about", "dtq_statistics", "edges"]


def test_statistics_of_another_version_are_refused_in_one_line(tmp_path):
    path = tmp_path / "s.safetensors"
    store.save(Statistics({"a.b": seen(calls())}, (250.0, 500.0, 750.0)), path)
    tensors = {k.replace("hessian.", "gram."): t for k, t in load_file(path).items()}
    about = {"about": "{}", "edges": "[250.0, 500.0, 750.0]"}
    for metadata, found in (
        ({**about, "dtq_statistics": "1"}, "version 1"),
        (about, "no statistics"),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(CheckpointError, match=f"{found}, .*run dtq calibrate again") as caught:
            store.load(path)
        assert "\n" not in str(caught.value)


def test_bad_statistics_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="dtq calibrate"):
        store.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="no such folder"):
        store.save(Statistics({}, ()), tmp_path / "no" / "s.safetensors")
