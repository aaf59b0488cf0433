# SPDX-License-Identifier: Apache-2.0
"""Layers whose shape an engine cannot hold are adapted when the model is planned."""

from __future__ import annotations

import pytest
import zoo
from builders import planned

from dtq.engines import TARGETS
from dtq.engines.target import StoredLayer, common_reason
from dtq.errors import InputError
from dtq.models.linears import is_pointwise
from dtq.pipelines.loading import load_transformer
from dtq.recipe import Recipe


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["SanaTransformer2DModel", "WanTransformer3DModel", "LuminaNextDiT2DModel"]
)
def test_a_plan_for_a_target_has_only_layers_that_it_holds(name, target):
    limits = TARGETS[target].limits
    loaded = load_transformer(zoo.model(name))
    try:
        run = planned(loaded, Recipe.load(limits.recipe), target=target)
    except InputError as error:
        assert "leaves every layer" in str(error)  # noqa: PT017
        return
    for layer in run.plan.quantized():
        assert not is_pointwise(run.model.get_submodule(layer.name))
        assert common_reason(StoredLayer(layer.spec, layer.shape, {}), limits) is None
