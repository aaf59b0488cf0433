# SPDX-License-Identifier: Apache-2.0
"""Layers whose shape an engine cannot hold are adapted when the model is planned."""

from __future__ import annotations

import pytest
import zoo
from builders import planned

from dtq.engines import TARGETS
from dtq.engines.constrain import in_format
from dtq.engines.target import StoredLayer, common_reason
from dtq.errors import InputError
from dtq.io.schema import MethodSpec
from dtq.models.linears import is_pointwise
from dtq.pipelines.loading import load_transformer
from dtq.plan.layers import LayerPlan, LayerSpec
from dtq.recipe import Recipe

REFUSED = {
    ("SanaTransformer2DModel", "gguf"),
    ("SanaTransformer2DModel", "nunchaku-lite"),
    ("WanTransformer3DModel", "nunchaku-lite"),
}
"""Tiny models whose layers are all too narrow for a target."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["SanaTransformer2DModel", "WanTransformer3DModel", "LuminaNextDiT2DModel"]
)
def test_a_plan_for_a_target_has_only_layers_that_it_holds(name, target):
    limits = TARGETS[target].limits
    loaded = load_transformer(zoo.model(name))
    if (name, target) in REFUSED:
        with pytest.raises(InputError, match="leaves every layer"):
            planned(loaded, Recipe.load(limits.recipe), target=target)
        return
    run = planned(loaded, Recipe.load(limits.recipe), target=target)
    assert run.plan.quantized()
    for layer in run.plan.quantized():
        assert not is_pointwise(run.model.get_submodule(layer.name))
        assert common_reason(StoredLayer(layer.spec, layer.shape, {}), limits) is None


def test_a_later_format_must_be_held_as_well():
    """For promotion and allocation: a shape, an activation format or a transform may not fit."""
    spec = LayerSpec("int8-row", "nvfp4")
    layer = LayerPlan("a", "other", (24, 64), spec, MethodSpec("none"))
    moved = in_format(layer, "nvfp4", "comfy-nvfp4")
    assert moved.weight_format == "int8-row"
    assert moved.note == "comfy-nvfp4: its 24 rows are no multiple of 16"
    assert in_format(layer, "nvfp4", "").weight_format == "nvfp4"
    wide = LayerPlan("a", "other", (32, 64), spec, MethodSpec("none"))
    assert in_format(wide, "nvfp4", "comfy-nvfp4").weight_format == "nvfp4"
    fine = LayerPlan("a", "other", (32, 64), LayerSpec("nvfp4", "nvfp4"), MethodSpec("none"))
    assert "activations nvfp4" in in_format(fine, "int8-row", "comfy-nvfp4").note
