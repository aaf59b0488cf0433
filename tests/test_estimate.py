# SPDX-License-Identifier: Apache-2.0
"""The time that a plan foretells: how often the model runs, and what is not done is not counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from builders import planned, quantized

from dtq.calibrate import engine
from dtq.estimate import duration
from dtq.estimate.hardware import reading_time
from dtq.estimate.size import estimate
from dtq.io.schema import MethodSpec
from dtq.pipelines.loading import load_transformer
from dtq.recipe.resolve import Recipe
from dtq.stages.calibrate import statistics_needed

RECIPE = Recipe.load(
    "w4a8",
    solver="rtn",
    calibration={"steps": 3, "samples": 5, "batch_size": 2, "num_timestep_bins": 4},
    promote={"to": ""},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("estimate") / "model"
    tiny.pipeline().save_pretrained(made)
    return made


def seconds(source, recipe, driven, memory=2**34):
    run = planned(source, recipe)
    scan, plan = run.scan, run.plan
    needs = statistics_needed(recipe, driven)
    how = {"needs": needs, "driven": driven, "memory": memory}
    return estimate(source.model, scan, plan, recipe, torch.float32, **how).seconds


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    """Layers that cost nothing, on a machine of one operation a second."""
    monkeypatch.setattr(duration, "multiply_rate", lambda dtype: 1.0)
    monkeypatch.setattr(duration, "touch", lambda: 1.0)
    monkeypatch.setattr(
        duration, "paces", lambda layers, *_: {duration.kind(x): Free() for x in layers}
    )


class Free:
    def seconds(self, *_):
        return 0.0


@pytest.mark.parametrize("driven", [True, False])
def test_the_calls_that_are_foretold_are_made(folder, driven):
    source = load_transformer(str(folder if driven else folder / "transformer"))
    sites = planned(source, RECIPE).scan.input_groups
    pictures = []

    def count(_, args, kwargs):
        pictures.append(len(args[0] if args else kwargs["hidden_states"]))

    handle = source.model.register_forward_pre_hook(count, with_kwargs=True)
    engine.calibrate(source, sites, RECIPE.calibration, RECIPE.needs(), progress=False)
    handle.remove()
    runs = duration.runs_of(source.model, RECIPE, driven)
    assert len(pictures) == runs.calls
    assert max(pictures) == runs.pictures  # the last batch of a pipeline may be smaller


def test_a_model_without_a_second_branch_runs_half_as_much(folder):
    source = load_transformer(str(folder))
    guided = replace(RECIPE, calibration=replace(RECIPE.calibration, guidance=1.0))
    assert duration.runs_of(source.model, RECIPE, True).branches == 2
    assert duration.runs_of(source.model, guided, True).branches == 1
    distilled = tiny.flux()
    distilled.register_to_config(guidance_embeds=True)
    assert duration.runs_of(distilled, RECIPE, True).branches == 1


def test_every_portion_of_the_statistics_is_a_run_of_its_own(folder):
    source = load_transformer(str(folder))
    alone = replace(
        RECIPE, transform_candidates=(), transform=MethodSpec("none")
    )  # no second moments
    run = planned(source, alone)
    scan, plan = run.scan, run.plan
    portions = sum(any(not plan[x.name].unquantized for x in s.linears) for s in scan.input_groups)
    once, often = (seconds(source, alone, True, memory) for memory in (2**34, 1))
    runs = duration.runs_of(source.model, alone, True)
    seen = runs.calls * runs.pictures
    looked = duration.LOOKED * runs.looked + duration.TRACED_BATCH
    assert often / once == pytest.approx((portions * seen + looked) / (seen + looked))


def test_a_mapped_model_is_read_whenever_it_runs(folder):
    source = load_transformer(str(folder / "transformer"))
    run = planned(source, RECIPE)
    scan, plan = run.scan, run.plan
    how = {"needs": RECIPE.needs(), "driven": False}
    without, read = (
        estimate(source.model, scan, plan, RECIPE, torch.float32, **how, reading=r).seconds
        for r in (0.0, 1e9)
    )
    runs = duration.runs_of(source.model, RECIPE, False)
    # traced, hashed, solved, seen, and looked at
    assert (read - without) / 1e9 == pytest.approx(
        3 + runs.calls + duration.LOOKED * runs.looked, 1e-3
    )


def test_reading_is_timed_where_there_are_files(folder, tmp_path):
    assert reading_time(folder, "transformer") > 0
    assert reading_time(folder / "transformer", "transformer") > 0
    assert reading_time(tmp_path, "transformer") == reading_time(tmp_path / "no", "x") == 0


def test_without_data_nothing_is_looked_at(folder):
    source, recipe = load_transformer(str(folder / "transformer")), Recipe.load("w4a16")
    run = planned(source, recipe)
    scan, plan = run.scan, run.plan
    how = {"needs": frozenset(), "driven": False}
    without, read = (
        estimate(source.model, scan, plan, recipe, torch.float32, **how, reading=r).seconds
        for r in (0.0, 1e9)
    )
    assert (read - without) / 1e9 == pytest.approx(3, 1e-3)  # traced, hashed, solved


def test_what_is_not_compared_costs_nothing(folder):
    driven, bare = load_transformer(str(folder)), load_transformer(str(folder / "transformer"))
    compared, plain = (replace(RECIPE, transform_candidates=x) for x in (("hadamard",), ()))
    assert seconds(driven, compared, True) > seconds(driven, plain, True)
    assert seconds(bare, compared, False) == seconds(bare, plain, False)
    assert quantized(bare, compared, progress=False).transform_errors == {}
