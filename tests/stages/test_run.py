# SPDX-License-Identifier: Apache-2.0
"""The list of stages, and single stages on a tiny run."""

from __future__ import annotations

import pytest
import tiny
from builders import planned
from conftest import QUICK

from dtq import api
from dtq.errors import InputError
from dtq.nn import QuantLinear
from dtq.pipelines.loading import load_transformer
from dtq.recipe import Recipe
from dtq.stages.calibrate import calibrate
from dtq.stages.replace_layers import replace_layers
from dtq.stages.solve import solve


def quantized_layers(run) -> set[str]:
    return {n for n, m in run.model.named_modules() if isinstance(m, QuantLinear)}


def a_run(**options):
    return planned(load_transformer(tiny.pipeline()), Recipe.load("rtn-w4a8", **QUICK), **options)


def test_the_story_is_a_list_of_stages():
    stages = (*api.FLOAT_STAGES, *api.SHARED_STAGES, *api.MAIN_STAGES)
    assert [stage.__name__ for stage in stages] == [
        "plan", "calibrate", "record_calls",
        "solve", "compare_transforms", "mixed_precision",
        "promote", "replace_layers", "finetune", "step_policy", "attention", "sanity_check",
        "attach_config",
    ]  # fmt: skip


def test_the_model_stays_float_until_layers_are_replaced():
    run = a_run()
    calibrate(run)
    solve(run)
    names = {layer.name for layer in run.plan.quantized()}
    assert set(run.results) == names
    assert not quantized_layers(run)
    replace_layers(run)
    assert quantized_layers(run) == names
    assert [x.name for x in run.report.layers] == [x.name for x in run.plan.quantized()]
    assert run.results == {}
    assert run.floats == {}


def test_float_layers_are_kept_for_the_sanity_check_and_dropped_at_the_end():
    run = a_run(check=True)
    calibrate(run)
    solve(run)
    replace_layers(run)
    assert set(run.floats) == quantized_layers(run)
    run = a_run(check=True)
    api.run_stages([run])
    assert run.floats == {}
    assert run.recorded == []
    assert run.statistics is None
    assert run.report.sanity_check["promoted"] == []


def test_statistics_of_another_model_are_refused():
    recipe = Recipe.load("rtn-w4a8", correct_bias=True, **QUICK)
    first = planned(load_transformer(tiny.pipeline()), recipe)
    calibrate(first)
    narrow = load_transformer(tiny.pipeline(heads=2))
    second = planned(narrow, recipe, statistics=first.statistics)
    with pytest.raises(InputError, match="another model"):
        calibrate(second)


def test_a_budget_below_the_narrowest_format_is_refused_by_the_plan():
    allocate = {"budget": 1.0, "formats": ["int4-row", "int8-row"]}
    with pytest.raises(InputError, match="too small"):
        planned(load_transformer(tiny.pipeline()), Recipe.load("w4a8", allocate=allocate))
