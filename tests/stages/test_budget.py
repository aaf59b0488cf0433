# SPDX-License-Identifier: Apache-2.0
"""Budgets of a recipe on models whose layers take more or less than wide ones."""

from __future__ import annotations

import logging
import math
import re

import pytest
import tiny
import torch
from builders import planned
from click.testing import CliRunner
from conftest import hasty

import dtq
from dtq.cli import main
from dtq.errors import InputError
from dtq.estimate import estimate
from dtq.pipelines.loading import LoadedModel
from dtq.recipe import Recipe
from dtq.stages.budget import promotion_budget

FORMATS = ["int4-asym-g128", "int4-asym-g64", "int4-asym-g32"]
NARROWEST, WIDEST = 4 + 24 / 128, 4 + 24 / 32
"""Bits per weight of the formats where they fit."""
WIDE, NARROW = {"heads": 4}, {"heads": 6}  # 128 and 192 columns: groups of 128 do not fit 192


def narrow() -> LoadedModel:
    return LoadedModel("DiT", None, "transformer", tiny.dit(blocks=1, **NARROW))


def chosen(model: LoadedModel, budget: float, adapt: bool = True) -> float:
    recipe = Recipe.load("q-dit", allocate={"budget": budget, "adapt": adapt, "formats": FORMATS})
    return float(planned(model, recipe).recipe.allocate.budget)


def least(model: LoadedModel) -> float:
    plan = planned(model, Recipe.load("q-dit", allocate={"budget": ""})).plan
    weights = sum(math.prod(x.shape) for x in plan.gemm())
    sizes = [min(x.in_format(f).nbytes(plan.bins) for f in FORMATS) for x in plan.gemm()]
    return 8 * sum(sizes) / weights


def test_a_budget_that_cannot_be_reached_keeps_its_margin():
    model = narrow()
    needed = least(model)
    assert needed > NARROWEST + 0.1
    for margin in (0.0, 0.03, needed - NARROWEST - 1e-3):
        got = chosen(model, NARROWEST + margin)
        assert got == pytest.approx(needed + margin, abs=2e-4)
    assert chosen(model, 2.0) == pytest.approx(needed, abs=2e-4)
    assert chosen(model, needed + 0.01) == needed + 0.01


def test_a_budget_where_the_formats_fit_is_kept():
    model = LoadedModel("DiT", None, "transformer", tiny.dit(blocks=1, **WIDE))
    for budget in (NARROWEST, 4.3, WIDEST):
        assert chosen(model, budget) == budget


def test_the_error_says_where():
    message = r"^DiT: allocate\.budget \(--budget\) of 4\.2 is too small: .* at least \d+ bytes"
    with pytest.raises(InputError, match=message):
        chosen(narrow(), 4.2, adapt=False)


@pytest.fixture
def promoting() -> Recipe:
    """A budget that the layers of the narrow model exceed before any promotion."""
    promote = {"to": "int8-row", "budget": 4.3, "adapt": True}
    return hasty("w4a8", promote=promote)


def test_the_estimate_has_the_promotion_budget_of_the_model(promoting, caplog):
    run = planned(narrow(), promoting)
    with caplog.at_level(logging.WARNING, "dtq"):
        cost = estimate(run, torch.float32)
    assert promotion_budget(run) > 4.3
    assert float(cost.budget) == pytest.approx(promotion_budget(run), abs=5e-4)
    assert "promote.budget" not in caplog.text
    allocated = planned(narrow(), Recipe.load("q-dit"))
    assert estimate(allocated, torch.float32).budget == allocated.recipe.allocate.budget


def test_the_plan_shows_the_adapted_budget(tmp_path):
    tiny.dit(blocks=1, **NARROW).save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--set", "promote={to: int8-row, budget: 4.3, adapt: true}"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    (shown,) = re.findall(r"if the whole budget is spent \((.*)\)", result.stdout)
    recipe = Recipe.load("w4a8", promote={"to": "int8-row", "budget": 4.3, "adapt": True})
    assert float(shown) == pytest.approx(promotion_budget(planned(narrow(), recipe)), abs=5e-4)
    assert float(shown) > 4.3


def test_promotion_warns_once(promoting, caplog):
    with caplog.at_level(logging.WARNING, "dtq"):
        dtq.quantize(tiny.dit(blocks=1, **NARROW), promoting, progress=False)
    assert caplog.text.count("promote.budget of 4.30 bits per weight") == 1
