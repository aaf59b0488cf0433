# SPDX-License-Identifier: Apache-2.0
"""Every transformer class of diffusers, tiny and random: scan, plan, quantize, save, load, run."""

from __future__ import annotations

import pytest
import torch
import zoo

import dtq
from dtq.nn import QuantLinear

RECIPES = ("w4a8", "w4a16", "nvfp4")
# relative squared error of the output; random weights of width 16 to 64 forgive less than real ones
BARS = {"w4a8": 0.02, "w4a16": 0.2, "nvfp4": 0.2}
QUICK = {"calibration": {"samples": 2, "batch": 1, "steps": 4, "bins": 2}}


@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trip(name, recipe, tmp_path):
    model = zoo.model(name)
    with torch.no_grad():
        want = zoo.first_tensor(model(**zoo.inputs(name))).double()
    calls = [zoo.inputs(name, seed) for seed in range(2)]
    dtq.quantize(model, recipe, inputs=calls, progress=False, **QUICK)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    with torch.no_grad():
        got = zoo.first_tensor(model(**zoo.inputs(name)))
    error = float((got.double() - want).square().sum() / want.square().sum())
    assert error < BARS[recipe]
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        again = zoo.first_tensor(loaded(**zoo.inputs(name)))
    assert torch.equal(got, again)


def test_the_zoo_is_complete():
    assert set(zoo.names()) == set(zoo.classes())
