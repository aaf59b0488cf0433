# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe on tiny models of many families: narrow ones, and widths 64 does not divide."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
import zoo
from builders import EVERYTHING, collected, planned, quantized
from conftest import hasty

import dtq
from dtq.errors import InputError
from dtq.io.package_data import yaml_names
from dtq.pipelines.loading import LoadedModel

FAMILIES = {
    "DiTTransformer2DModel": lambda: tiny.dit(blocks=1),
    "PixArtTransformer2DModel": lambda: zoo.model("PixArtTransformer2DModel"),
    "HunyuanDiT2DModel": lambda: zoo.model("HunyuanDiT2DModel"),
    "FluxTransformer2DModel": lambda: zoo.model("FluxTransformer2DModel"),
    "WanTransformer3DModel": lambda: zoo.model("WanTransformer3DModel"),
    "LTXVideoTransformer3DModel": lambda: zoo.model("LTXVideoTransformer3DModel"),
    "width 192": lambda: tiny.dit(blocks=1, heads=6),
}


def pairs() -> list[tuple[str, str]]:
    """Every recipe on the width that fits fewest formats, and on two of the families in turn."""
    odd, families = "width 192", [*FAMILIES]
    families.remove(odd)
    chosen = {odd: yaml_names("recipes"), **{family: [] for family in families}}
    for i, recipe in enumerate(yaml_names("recipes")):
        for family in (families[i % 6], families[(i + 1 + i // 6 % 5) % 6]):
            chosen[family].append(recipe)
    return [(family, recipe) for family, recipes in chosen.items() for recipe in recipes]


@pytest.fixture(scope="module")
def prepared(request):
    """A family, one call of its model, and the statistics of that call."""
    label = request.param
    make = FAMILIES[label]
    name = "DiTTransformer2DModel" if label == "width 192" else label
    call = zoo.inputs(name)
    if name.startswith("DiT"):
        call = {
            "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
            "timestep": torch.tensor([500, 500]),
            "class_labels": torch.tensor([1, 2]),
        }
    loaded = LoadedModel(name, None, "transformer", make())
    return make, [call], collected(loaded, hasty("w4a8"), EVERYTHING, inputs=[call])


@pytest.mark.parametrize(("prepared", "recipe"), pairs(), indirect=["prepared"])
def test_a_shipped_recipe_runs_on_families(prepared, recipe, few_vectors, tmp_path):
    make, calls, statistics = prepared
    model = make()
    loaded = LoadedModel("model", None, "transformer", model)
    report = quantized(loaded, hasty(recipe), inputs=calls, statistics=statistics)
    assert report.plan.quantized()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        want, got = (m(**calls[0], return_dict=False)[0] for m in (model, again))
    assert want.isfinite().all()
    assert torch.equal(want, got)


def test_the_families_are_narrow_and_odd():
    widths = [
        {
            m.in_features
            for n, m in make().named_modules()
            if isinstance(m, torch.nn.Linear) and "block" in n
        }
        for make in FAMILIES.values()
    ]
    assert any(max(each) < 128 for each in widths)
    assert any(width % 64 for each in widths for width in each)


def test_a_budget_of_the_user_is_refused_and_a_presets_adapts(caplog):
    loaded = LoadedModel("DiT", None, "transformer", tiny.dit(blocks=1, heads=6))
    with caplog.at_level(logging.WARNING, "dtq"):
        run = planned(loaded, hasty("q-dit"))
    assert "too small" in caplog.text
    assert float(run.recipe.allocate.budget) > 4.3
    own = {"budget": 4.3, "formats": ["int4-asym-g128", "int4-asym-g64", "int4-asym-g32"]}
    with pytest.raises(InputError, match="too small"):
        dtq.quantize(tiny.dit(blocks=1, heads=6), "q-dit", allocate=own, progress=False)
