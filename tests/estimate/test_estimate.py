# SPDX-License-Identifier: Apache-2.0
"""Estimates before a run: which model evaluations are counted, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import pipelines
import pytest
import tiny
import torch
from builders import planned, quantized
from click.testing import CliRunner

from dtq.calibrate import engine
from dtq.cli import main
from dtq.estimate import duration, estimate
from dtq.estimate.calibrating import calibrating_memory
from dtq.estimate.fake_pipeline import meta_pipeline
from dtq.io.schema import MethodSpec
from dtq.pipelines.loading import load_transformer
from dtq.recipe import Recipe
from dtq.stages.calibrate import statistics_needed

RECIPE = Recipe.load(
    "w4a8",
    solver="rtn",
    calibration={"steps": 3, "samples": 5, "batch_size": 2, "num_timestep_bins": 4},
    promote={"to": ""},
)
NEEDS = RECIPE.needs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("estimate") / "model"
    tiny.pipeline().save_pretrained(made)
    return made


@pytest.fixture(autouse=True)
def one_operation_per_second(monkeypatch):
    monkeypatch.setattr(duration, "gemm_rate", lambda dtype: 1.0)


def seconds(run, has_pipeline=True, **options):
    needs = statistics_needed(run.recipe, has_pipeline)
    return estimate(run, torch.float32, needs=needs, has_pipeline=has_pipeline, **options).seconds


@pytest.mark.parametrize("has_pipeline", [True, False])
def test_the_images_of_the_calibration_are_counted(folder, has_pipeline):
    run = planned(load_transformer(str(folder if has_pipeline else folder / "transformer")), RECIPE)
    images = []

    def count(_, args, kwargs):
        images.append(len(args[0] if args else kwargs["hidden_states"]))

    handle = run.model.register_forward_pre_hook(count, with_kwargs=True)
    engine.calibrate(run.loaded, run.scan.input_groups, RECIPE.calibration, NEEDS, progress=False)
    handle.remove()
    counted = duration.model_evaluations(run, NEEDS, has_pipeline)
    assert counted["calibrate"] == sum(images)


def test_a_model_without_a_second_branch_runs_half_as_much(folder):
    run = planned(load_transformer(str(folder)), RECIPE)
    assert duration.guidance_branches(run) == 2
    run.recipe = replace(RECIPE, calibration=replace(RECIPE.calibration, guidance=1.0))
    assert duration.guidance_branches(run) == 1
    run = planned(load_transformer(tiny.flux()), RECIPE)
    run.model.register_to_config(guidance_embeds=True)
    assert duration.guidance_branches(run) == 1


def test_little_memory_takes_a_run_of_the_model_per_input_group(folder):
    run = planned(load_transformer(str(folder)), RECIPE)
    groups = [
        g for g in run.scan.input_groups if any(not run.plan[x.name].unquantized for x in g.linears)
    ]
    counts = []
    for run.memory in (2**34, 1):
        counts.append(duration.model_evaluations(run, NEEDS, True)["calibrate"])
    once, often = counts
    assert often == len(groups) * once


def test_only_what_the_recipe_asks_for_is_counted(folder):
    run = planned(load_transformer(str(folder)), replace(RECIPE, transform_candidates=()))
    counted = duration.model_evaluations(run, NEEDS, True)
    assert {stage for stage, images in counted.items() if images} == {"calibrate", "sanity check"}
    for changes, stages in (
        ({"transform_candidates": ["hadamard"]}, {"compare transforms"}),
        ({"allocate": {"budget": 5}}, {"mixed precision"}),
        ({"finetune": "blocks"}, {"finetune"}),
        ({"step_policy": {"precisions": ["native", "a16"]}}, {"step policy"}),
    ):
        run.recipe = Recipe.load(RECIPE, **{"transform_candidates": [], **changes})
        more = duration.model_evaluations(run, NEEDS, True)
        extra = {stage for stage in more if more[stage] > counted[stage]}
        assert extra == {"record calls", *stages}


def test_without_data_the_time_is_that_of_the_solver(folder):
    run = planned(load_transformer(str(folder / "transformer")), Recipe.load("w4a16"))
    assert not any(duration.model_evaluations(run, frozenset(), False).values())
    assert seconds(run, False) == duration.solver_operations(run, frozenset())


def test_what_is_not_compared_costs_nothing(folder):
    has_pipeline = load_transformer(str(folder))
    bare = load_transformer(str(folder / "transformer"))
    compared, plain = (replace(RECIPE, transform_candidates=x) for x in (("hadamard",), ()))
    assert seconds(planned(has_pipeline, compared)) > seconds(planned(has_pipeline, plain))
    assert seconds(planned(bare, compared), False) == seconds(planned(bare, plain), False)
    assert quantized(bare, compared, progress=False).transform_errors == {}


def test_alternatives_and_hessians_cost_solver_time(folder):
    run = planned(load_transformer(str(folder)), replace(RECIPE, transform_candidates=()))
    plain = duration.solver_operations(run, frozenset())
    assert duration.solver_operations(run, frozenset({"hessian"})) > 1.01 * plain
    run.recipe = replace(RECIPE, transform_candidates=("hadamard", "none"))
    assert 2 * plain < duration.solver_operations(run, frozenset()) < 3.01 * plain


def test_a_transform_is_searched_on_data_alone_and_on_some_channels(folder):
    run = planned(load_transformer(str(folder)), replace(RECIPE, transform_candidates=()))
    fixed = planned(run.loaded, replace(run.recipe, transform=MethodSpec("hadamard")))
    samples = frozenset({"sample"})
    assert duration.solver_operations(run, samples) > 2 * duration.solver_operations(fixed, samples)
    assert duration.solver_operations(run, frozenset()) == duration.solver_operations(
        fixed, samples
    )
    narrow, wide, wider = (
        duration._search_operations(replace(run.plan.gemm()[0], shape=(n, 64)))
        for n in (512, 1024, 4096)
    )
    assert 2 * narrow == wide == wider


def test_a_model_that_cannot_be_traced_has_no_time(folder):
    run = planned(load_transformer(str(folder)), RECIPE)
    run.scan = replace(run.scan, traced=False)
    assert seconds(run) is None


def test_a_larger_model_takes_longer(folder):
    small = planned(load_transformer(str(folder)), RECIPE)
    large = planned(load_transformer("demo"), RECIPE)
    assert seconds(large) > 2 * seconds(small)


def test_memory_limits_statistics_on_every_estimate(folder):
    run = planned(load_transformer(str(folder)), replace(RECIPE, transform=MethodSpec("hadamard")))
    sizes = []
    for run.memory in (2**34, 1):
        cost = estimate(run, torch.float32)
        sizes.append((cost.memory, cost.disk, cost.file))
    (memory, disk, file), (less, smaller, same) = sizes
    assert less <= memory
    assert smaller <= disk
    assert file == same


@pytest.mark.parametrize("dtype", ["auto", "fp16"])
def test_the_size_is_exact_when_the_dtypes_of_the_components_differ(dtype, tmp_path):
    """The whole pipeline is loaded in one dtype; in float16 a part of T5 stays float32."""
    source, out = tmp_path / "float", tmp_path / "q"
    pipeline = pipelines.flux()
    pipeline.transformer.bfloat16()
    pipeline.save_pretrained(source)
    few = [
        "--recipe", "rtn-w4a8", "--text-encoder", "w4a16", "--samples", "2", "--steps", "2",
        "--dtype", dtype,
    ]  # fmt: skip
    shown = CliRunner().invoke(main, ["plan", str(source), *few, "--json"])
    done = CliRunner().invoke(main, ["quantize", str(source), *few, "-o", str(out)])
    assert (shown.exit_code, done.exit_code) == (0, 0), shown.output + done.output
    for name, part in json.loads(shown.stdout.strip().splitlines()[-1]).items():
        (file,) = (out / name).glob("*.safetensors")
        assert file.stat().st_size == part["bytes"], name


def test_what_a_pipeline_holds_while_it_calibrates_is_in_the_peak(folder):
    """Its other models, and activations that grow with the batch of the calibration."""
    held = {}
    for batch in (2, 8):
        calibration = replace(RECIPE.calibration, batch_size=batch)
        held[batch] = calibrating_memory(
            meta_pipeline(folder), calibration, torch.float32, mapped=False
        )
    vae = load_transformer(str(folder)).pipeline.vae
    stored = sum(t.nbytes for t in vae.state_dict().values())
    assert held[2].weights["vae"] == held[8].weights["vae"] == stored
    assert held[8].around("vae") == held[8].weights["transformer"] + held[8].activations
    assert 3.5 < held[8].activations / held[2].activations < 4.5
    run = planned(load_transformer(str(folder)), RECIPE)
    more = [estimate(run, torch.float32, around=around).memory for around in (0, 10**9)]
    assert more[1] - more[0] > 0.9e9
