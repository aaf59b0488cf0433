# SPDX-License-Identifier: Apache-2.0
"""The story end to end on a tiny DiT, and what each option changes."""

from __future__ import annotations

import copy
import logging

import pytest
import tiny
import torch
from builders import EVERYTHING, planned
from conftest import QUICK, hasty

import dtq
from dtq.calibrate import store
from dtq.calibrate.engine import calibrate
from dtq.demo.outliers import inject_outliers
from dtq.errors import InputError
from dtq.evaluate import trajectory
from dtq.nn import QuantLinear
from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel, load_transformer
from dtq.pipelines.settings import SamplingSettings
from dtq.pipelines.tracing import dummy_inputs, scan_model
from dtq.recipe import Recipe
from dtq.stages import solve

HOW = SamplingSettings(samples=4, steps=4, batch_size=4, seed=99)


@pytest.fixture(scope="module", params=["plain", "hard"])
def truth(request):
    pipe = tiny.pipeline()
    if request.param == "hard":
        inject_outliers(pipe.transformer)
    return request.param, trajectory.record(
        pipe, pipe.transformer, prompts.load("auto", pipe, 4), HOW
    )


COARSE = {"search": {"step": 0.25}}
_errors: dict[tuple[str, str, bool], float] = {}


def error_of(kind, truth, recipe, transformed=True) -> float:
    key = kind, recipe, transformed
    if key not in _errors:
        _errors[key] = measured(kind, truth, recipe, COARSE if transformed else "none")
    return _errors[key]


def measured(kind, truth, recipe, transform) -> float:
    pipe = tiny.pipeline()
    if kind == "hard":
        inject_outliers(pipe.transformer)
    changed = {} if recipe.startswith("rtn") else {"transform": transform}
    dtq.quantize(pipe, recipe, progress=False, **QUICK, **changed)
    steps = trajectory.teacher_forced(truth, pipe.transformer)
    return sum(steps) / len(steps)


def test_recipes_come_in_the_right_order(truth):
    kind, recorded = truth
    errors = {r: error_of(kind, recorded, r) for r in ("w8a8", "w4a8", "rtn-w4a8")}
    assert errors["w8a8"] < 0.3 * errors["w4a8"]
    assert errors["w4a8"] < 0.5 * errors["rtn-w4a8"]


def test_no_transform_is_worse_on_the_hard_twin(truth):
    kind, recorded = truth
    if kind == "hard":
        alone = error_of(kind, recorded, "w4a8", transformed=False)
        assert error_of(kind, recorded, "w4a8") < 0.3 * alone


def test_harden_is_the_same_function_with_other_activations():
    model, twin = tiny.dit(), inject_outliers(tiny.dit())
    x = torch.randn(4, 4, 8, 8)
    arguments = {"timestep": torch.tensor([900] * 4), "class_labels": torch.arange(4)}
    with torch.no_grad():
        a, b = model(x, **arguments)[0], twin(x, **arguments)[0]
    assert ((a - b).norm() / a.norm()) < 1e-4
    seen = []
    for m in (model, twin):
        hook = (
            m.transformer_blocks[1]
            .ff.net[0]
            .proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().amax((0, 1))))
        )
        with torch.no_grad():
            m(x, **arguments)
        hook.remove()
    plain, hard = ((p.max() / p.mean()).item() for p in seen)
    assert hard > 4 * plain
    with pytest.raises(InputError, match="adaLN-zero"):
        inject_outliers(tiny.pixart())


@pytest.fixture(scope="module")
def once():
    """The state of a transformer that is quantized."""
    return dtq.quantize(tiny.pipeline(), hasty("w4a8"), progress=False).transformer.state_dict()


def test_quantizing_is_deterministic(once):
    again = dtq.quantize(tiny.pipeline(), hasty("w4a8"), progress=False).transformer.state_dict()
    assert once.keys() == again.keys()
    assert all(torch.equal(once[k], again[k]) for k in once)


def test_statistics_are_reusable_and_equal_calibrating_now(tmp_path, once):
    source = load_transformer(tiny.pipeline())
    recipe = hasty("w4a8")
    scan = planned(source, recipe).scan
    stats = calibrate(source, scan.input_groups, recipe.calibration, EVERYTHING, progress=False)
    store.save(stats, tmp_path / "s.safetensors")
    again = store.load(tmp_path / "s.safetensors")
    later = dtq.quantize(
        tiny.pipeline(), hasty("w4a8"), statistics=again, progress=False
    ).transformer
    assert all(torch.equal(once[k], t) for k, t in later.state_dict().items())
    with pytest.raises(InputError, match="another model"):
        dtq.quantize(tiny.pipeline(heads=2), hasty("w4a8"), statistics=again, progress=False)


def test_n_processes_equal_one():
    """Two halves of the calls, merged, are the statistics of all of them."""
    model = tiny.dit()
    scan = scan_model(model)
    calls = [dummy_inputs(model, 4, t, i) for i, t in enumerate((900.0, 700.0, 300.0, 100.0))]
    source = LoadedModel("x", None, "transformer", model)
    how = SamplingSettings(num_timestep_bins=4)
    whole = calibrate(
        source, scan.input_groups, how, frozenset({"channels"}), inputs=calls, progress=False
    )
    half = calibrate(
        source, scan.input_groups, how, frozenset({"channels"}), inputs=calls[:2], progress=False
    )
    half.merge(
        calibrate(
            source,
            scan.input_groups,
            how,
            frozenset({"channels"}),
            inputs=calls[2:],
            progress=False,
        )
    )
    for name, stats in whole.inputs.items():
        for key, tensor in stats.tensors().items():
            torch.testing.assert_close(half.inputs[name].tensors()[key], tensor)


def test_calibration_leaves_no_hooks_and_sees_both_branches_and_all_bins():
    pipe = tiny.pipeline()
    source = load_transformer(pipe)
    scan = scan_model(source.model)
    before = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in source.model.modules())
    stats = calibrate(
        source, scan.input_groups, hasty("w4a8").calibration, EVERYTHING, progress=False
    )
    after = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in source.model.modules())
    assert before == after
    group = stats.inputs["transformer_blocks.0.attn1.to_q"]
    assert (group.channels.rows > 0).all()
    assert set(group.sample.stratum.tolist()) == set(range(8))
    assert stats.edges == (250.0, 500.0, 750.0)


def test_bias_correction_removes_the_mean_error():
    errors = {}
    for correct in (False, True):
        pipe = dtq.quantize(
            tiny.pipeline(), "rtn-w4a8", correct_bias=correct, progress=False, **QUICK
        )
        layer = pipe.transformer.transformer_blocks[1].ff.net[2]
        float_layer = tiny.dit().transformer_blocks[1].ff.net[2]
        seen = []
        hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        tiny.sample(pipe)
        hook.remove()
        x = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen])
        with torch.no_grad():
            errors[correct] = (layer(x) - float_layer(x)).mean(0).norm().item()
    assert errors[True] < 0.5 * errors[False]


def test_modulation_switch_changes_bits():
    bits = {}
    for how in ("w8a16", "w4a16"):
        plan = Recipe.load("w4a8", modulation=how).plan(scan_model(tiny.dit()))
        bits[how] = plan.bits([x for x in plan.quantized() if x.role == "adaln"])
    assert bits["w8a16"] <= 8.4
    assert bits["w4a16"] <= 4.4


@pytest.mark.parametrize("activations", ["int8-row", "int8-static-timestep"])
def test_static_and_dynamic_activations(activations):
    pipe = tiny.pipeline()
    recorded = trajectory.record(pipe, pipe.transformer, prompts.load("auto", pipe, 4), HOW)
    dtq.quantize(pipe, "w8a8", activations=activations, transform=COARSE, progress=False, **QUICK)
    steps = trajectory.teacher_forced(recorded, pipe.transformer)
    assert max(steps) < 5e-3


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(InputError, match="leaves every layer"):
        dtq.quantize(tiny.dit(), "w4a8", exclude=["*"], progress=False)


def test_an_option_that_does_not_fit_a_layer_is_said(caplog):
    pipe = tiny.pipeline(heads=2)  # of width 64
    with caplog.at_level(logging.WARNING, "dtq"):
        dtq.quantize(
            pipe, "w4a8", progress=False, transform_candidates=[], transform="hadamard", solver="rtn",
            weights="int8-row", promote={"to": ""}, correct_bias=False,
            allocate={"budget": 9, "formats": ["int8-row", "int8-asym-g128"], "num_inputs": 1}, **QUICK,
        )  # fmt: skip
    name = "transformer_blocks.0.attn1.to_q"
    why = "int8-asym-g128 needs input features divisible by 128, got 64"
    assert f"{name}: stays in int8-row: {why}" in caplog.text


@pytest.mark.parametrize("what", ["weight", "input"])
def test_what_is_not_finite_is_refused_by_name_before_anything_is_chosen(what, monkeypatch):
    model = tiny.dit()
    recipe = hasty("w4a8")
    scan = planned(LoadedModel("dit", None, "transformer", model), recipe).scan
    stats = calibrate(
        LoadedModel("dit", None, "transformer", model), scan.input_groups, recipe.calibration, recipe.needs(),
        inputs=[dummy_inputs(model, 2, 500.0, 0)], progress=False,
    )  # fmt: skip
    name = "transformer_blocks.1.ff.net.2"
    if what == "weight":
        model.get_submodule(name).weight.data[3, 5] = float("nan")
    else:
        group = next(s for s in scan.input_groups if s.linears[0].name == name)
        stats.inputs[group.name].channels.total[0, 0] = float("inf")
    before = solve.choose_transform

    def choose(members, weights, stats):
        assert members[0].name != name
        return before(members, weights, stats)

    monkeypatch.setattr(solve, "choose_transform", choose)
    with pytest.raises(InputError, match=rf"{name}: .* 1 entries that are NaN or infinite"):
        dtq.quantize(
            model, recipe, statistics=stats, progress=False, transform={"search": {"step": 0.5}}
        )


def test_every_transformer_of_a_pipeline_is_quantized(tmp_path):
    pipe = tiny.two_stages()
    floats = [copy.deepcopy(pipe.transformer), copy.deepcopy(pipe.transformer_2)]
    dtq.quantize(pipe, hasty("w4a8"), progress=False)
    for model, was in zip((pipe.transformer, pipe.transformer_2), floats, strict=True):
        assert any(isinstance(m, QuantLinear) for m in model.modules())
        call = dummy_inputs(was, 2, 500.0, 0)
        with torch.no_grad():
            got, want = model(**call).sample, was(**call).sample
        assert float((got - want).square().sum() / want.square().sum()) < 0.02
    pipe.save_pretrained(tmp_path)
    again = tiny.TwoStages.from_pretrained(tmp_path)
    ran = [
        p([1, 2], generator=[torch.Generator().manual_seed(i) for i in range(2)]).images
        for p in (pipe, again)
    ]
    assert torch.equal(*ran)


def test_one_transformer_of_two(tmp_path):
    pipe = tiny.two_stages()
    dtq.quantize(pipe, hasty("w4a8"), component="transformer_2", progress=False)
    assert not any(isinstance(m, QuantLinear) for m in pipe.transformer.modules())
    assert any(isinstance(m, QuantLinear) for m in pipe.transformer_2.modules())
    with pytest.raises(InputError, match="transformer_2"):
        dtq.quantize(tiny.two_stages(), "w4a8", inputs=[{}], progress=False)
    with pytest.raises(InputError, match="its models are"):
        dtq.quantize(tiny.two_stages(), "w4a8", component="unet", progress=False)
