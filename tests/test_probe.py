# SPDX-License-Identifier: Apache-2.0
"""The time that a plan foretells: which work is counted, and how it grows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
from builders import planned

from dtq.estimate import solver_cost
from dtq.io.schema import MethodSpec
from dtq.pipelines.loading import load_transformer
from dtq.recipe.resolve import Recipe

RATE = 1e11


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "model"
    tiny.pipeline().save_pretrained(folder)
    return load_transformer(str(folder))


def paces_of(source, recipe):
    layers = planned(source, recipe).plan.quantized()
    return layers, solver_cost.paces(layers, recipe, recipe.needs(), RATE)


@pytest.mark.parametrize(
    ("transform", "rows", "outputs"),
    [
        (MethodSpec("search"), 512, 1024),
        (MethodSpec("search", (("num_channels", 64),)), 512, 64),
        (MethodSpec("ditas", (("num_rows", 100),)), 100, math.inf),
        (MethodSpec("none"), 0, math.inf),
    ],
)
def test_what_a_transform_is_chosen_on_is_read_off_its_knobs(transform, rows, outputs):
    assert solver_cost._sampled(transform) == (rows, outputs)


def test_a_wider_output_costs_no_more_choosing_than_the_transform_looks_at():
    pace = solver_cost.Pace(chosen=1e-6, rows=512, outputs=1024, column=0.0, weight=0.0, tries=1)
    free = math.inf  # of products
    assert pace.seconds((1024, 64), free, hessian=True) == pace.seconds(
        (4096, 64), free, hessian=True
    )
    assert pace.seconds((512, 64), free, hessian=True) < pace.seconds(
        (1024, 64), free, hessian=True
    )
    assert pace.seconds((64, 128), free, hessian=True) == 2 * pace.seconds(
        (64, 64), free, hessian=True
    )


def test_without_statistics_nothing_is_judged_on_them():
    pace = solver_cost.Pace(chosen=0.0, rows=0, outputs=math.inf, column=0.0, weight=1e-9, tries=1)
    alone = replace(pace, judged=False).seconds((512, 256), RATE, hessian=False)
    assert alone == pytest.approx(512 * 256 * 1e-9)
    assert pace.seconds((512, 256), RATE, hessian=False) > alone


def test_a_model_without_data_is_judged_by_weights_alone(source):
    recipe = Recipe.load("w4a16")
    paces = solver_cost.paces(planned(source, recipe).plan.quantized(), recipe, frozenset(), RATE)
    assert all(not pace.judged and pace.weight > 0 for pace in paces.values())


def test_without_data_the_largest_layer_is_solved_but_not_more_than_it_takes(source, monkeypatch):
    recipe = Recipe.load("w4a16")
    layers = planned(source, recipe).plan.quantized()
    solved = []
    solve = solver_cost.solve_input_group
    monkeypatch.setattr(
        solver_cost,
        "solve_site",
        lambda members, *a: solved.append(members[0]) or solve(members, *a),
    )
    solver_cost.paces(layers, recipe, frozenset(), RATE)
    assert {math.prod(x.shape) for x in solved} == {
        max(math.prod(x.shape) for x in layers if solver_cost.kind(x) == kind)
        for kind in map(solver_cost.kind, layers)
    }
    monkeypatch.setattr(solver_cost, "_MOST", 1000)
    solved.clear()
    solver_cost.paces(layers, recipe, frozenset(), RATE)
    assert max(math.prod(x.shape) for x in solved) <= 1000


def test_rivals_are_solved_and_cost_what_a_solve_costs():
    pace = solver_cost.Pace(chosen=0.0, rows=0, outputs=math.inf, column=1e-6, weight=1e-9, tries=1)
    once = pace.seconds((512, 256), RATE, hessian=True)
    assert replace(pace, tries=3).seconds((512, 256), RATE, hessian=True) == pytest.approx(3 * once)


@pytest.mark.parametrize("name", ["ditas", "w4a8", "rtn-w4a8"])
def test_every_kind_of_layer_is_measured_once_and_takes_time(name, source, monkeypatch):
    asked, how = [], "_streamed" if name == "rtn-w4a8" else "_measured"
    measured = getattr(solver_cost, how)
    monkeypatch.setattr(
        solver_cost, how, lambda x, *a: asked.append(solver_cost.kind(x)) or measured(x, *a)
    )
    layers, paces = paces_of(source, Recipe.load(name))
    assert set(asked) == set(paces)
    assert len(asked) == len(paces)
    for layer in layers:
        assert paces[solver_cost.kind(layer)].seconds(layer.shape, RATE, hessian=False) > 0


def test_a_grid_of_candidates_takes_longer_than_none(source):
    def choosing(recipe):
        _, paces = paces_of(source, recipe)
        alone = [replace(p, column=0.0, weight=0.0) for p in paces.values()]
        return max(p.seconds((4096, 1024), math.inf, hessian=False) for p in alone)

    grid = choosing(Recipe.load("ditas", solver="rtn"))
    assert grid > 10 * choosing(Recipe.load("ditas", solver="rtn", transform="none"))
