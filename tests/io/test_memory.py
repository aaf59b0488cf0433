# SPDX-License-Identifier: Apache-2.0
"""Mapped weights leave memory after their block has run; statistics wait on disk."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from builders import collected, quantized
from conftest import QUICK, hasty
from safetensors.torch import load_file, save_file
from torch import nn

import dtq
from dtq.calibrate import distributed, store
from dtq.errors import InputError
from dtq.io.memory import Mapped, paged_weights
from dtq.nn import QuantLinear
from dtq.pipelines.loading import load_transformer
from dtq.recipe import Recipe
from dtq.runs.tasks import TaskStore

linux = pytest.mark.skipif(sys.platform != "linux", reason="MADV_PAGEOUT is Linux's")
MB = 2**20


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(24))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def mapped_stack(path: Path) -> Stack:
    with torch.device("meta"):
        model = Stack()
    save_file({f"blocks.{i}.weight": torch.randn(1024, 1024) for i in range(24)}, path)
    model.load_state_dict(load_file(path), assign=True)
    return model.requires_grad_(False)


def resident_files() -> int:
    """Bytes of mapped files that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssFile")) * 1024


@linux
def test_a_mapped_model_is_resident_block_by_block(tmp_path):
    model = mapped_stack(tmp_path / "stack.safetensors")
    Mapped().release(model.parameters())
    x = torch.ones(1, 1024)
    before = resident_files()
    with paged_weights(model):
        first = model(x)
    assert resident_files() - before < 16 * MB  # of 96
    second = model(x)
    assert resident_files() - before > 64 * MB  # the test can see it
    with paged_weights(model):
        third = model(x)
    assert resident_files() - before < 16 * MB
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@linux
def test_only_mapped_tensors_are_touched(tmp_path):
    model = mapped_stack(tmp_path / "stack.safetensors")
    mapped = Mapped()
    assert all(mapped.holds(p) for p in model.parameters())
    own = torch.ones(1 << 20)
    assert not mapped.holds(own)
    mapped.release([own])
    assert bool((own == 1).all())


def test_statistics_that_do_not_fit_wait_on_disk(tmp_path, caplog):
    how = hasty("w4a8")
    whole, parts = (load_transformer(tiny.pipeline()) for _ in range(2))
    needs = how.needs()
    want = collected(whole, how, needs, progress=False)
    got = collected(parts, how, needs, progress=False, memory=600_000)
    assert "the float model runs" in caplog.text
    assert set(got.inputs) == set(want.inputs)
    assert got.edges == want.edges
    for name, group in want.inputs.items():
        again = got.inputs[name].tensors()
        assert all(torch.equal(tensor, again[key]) for key, tensor in group.tensors().items())


def test_parts_are_added_one_site_at_a_time(tmp_path, monkeypatch):
    source, how = load_transformer(tiny.pipeline()), hasty("w4a8")
    first, second = (collected(source, how, how.needs(), progress=False) for _ in range(2))
    path = tmp_path / "statistics.safetensors"
    distributed._add(path, first, 0)
    before = [weakref.ref(group) for group in second.inputs.values()]
    save = store.save

    def watched(statistics, path):
        assert len(statistics.inputs) == len(before)
        assert not any(group() for group in before)
        held = [t for group in statistics.inputs.values() for t in group.tensors().values()]
        assert not any(map(Mapped().holds, held))
        save(statistics, path)

    monkeypatch.setattr(store, "save", watched)
    distributed._add(path, second, 1)


def test_a_little_memory_gives_the_same_model():
    states = []
    for memory in (None, 600_000):
        pipe = dtq.quantize(tiny.pipeline(), hasty("w4a8"), progress=False, memory=memory)
        states.append(pipe.transformer.state_dict())
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


@linux
def test_what_is_solved_waits_in_its_files(float_folder, tmp_path):
    source = load_transformer(float_folder / "transformer")
    recipe = Recipe.load("w4a16")
    quantized(source, recipe, progress=False, tasks=TaskStore(tmp_path))
    layers = [m for m in source.model.modules() if isinstance(m, QuantLinear)]
    mapped = Mapped()
    assert layers
    assert all(mapped.holds(layer.weight) for layer in layers)
    assert not list(tmp_path.rglob("statistics/*"))  # weight-only, and nothing drives the model


def test_statistics_of_different_runs_do_not_mix(tmp_path):
    for seed in range(2):
        how = Recipe.load("w8a8", **{"calibration": {**QUICK["calibration"], "seed": seed}})
        source = load_transformer(tiny.pipeline())
        seen = collected(source, how, how.needs(), progress=False)
        store.save(seen, tmp_path / f"{seed}.safetensors")
    with pytest.raises(InputError, match="different runs"):
        store.load(tmp_path / "0.safetensors", tmp_path / "1.safetensors")


KEPT = """
    import resource, torch
    from dtq.io.memory import trim_malloc, tune_malloc
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    first = faults()
    tune_malloc()
    for _ in range(4):  # 16 blocks: see tune_malloc
        faults()
    kept, held = faults(), resident()
    trim_malloc(beyond=2**40)
    still = resident()
    trim_malloc()
    print(first, kept, held - still, held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own")
def test_what_is_freed_is_kept_until_it_is_given_back():
    command = [sys.executable, "-c", textwrap.dedent(KEPT)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    first, kept, early, given = map(int, printed.split())
    assert kept < first / 20
    assert early < 2**22  # what the interpreter itself frees
    assert given > 2**25
