# SPDX-License-Identifier: Apache-2.0
"""Every recipe, from quantizing to sampling, on the bundled model or its copy with outliers."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import tiny
import torch
from builders import EVERYTHING, collected, quantized
from conftest import QUICK, hasty
from diffusers import DiffusionPipeline

import dtq
from dtq.checkpoint import reader, writer
from dtq.demo.outliers import inject_outliers
from dtq.evaluate import trajectory
from dtq.evaluate.evaluate import stored_bits
from dtq.io import atomic
from dtq.io.package_data import yaml_names
from dtq.pipelines import prompts
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.settings import SamplingSettings
from dtq.recipe import Recipe

PRESETS = [
    "ditas",
    "viditq",
    "viditq-mp",
    "lrq-dit",
    "vq4dit",
    "hq-dit",
    "terdit",
    "ptq4dit",
    "q-dit",
    "svdquant",
]
FAMILY = ["w8a8", "w4a8", "w4a8-hq", "w4a16", "w4a16-hq", "w4a4", "w3a8", "nvfp4", "mxfp4", "w2-vq"]
FAST = SamplingSettings(samples=4, steps=5, batch_size=4, num_timestep_bins=4)
# two of eight blocks, and only the first is quantized: every path of the code in a fraction of the time
BLOCKS = (0, 7)
KEEP = ["transformer_blocks.1"]
# largest error with one block quantized; docs/results.md has the whole model
LOOSE = {"terdit": 0.01, "vq4dit": 0.01}


def test_the_presets_and_the_family_are_there():
    assert set(PRESETS) | set(FAMILY) <= set(yaml_names("recipes"))


@functools.cache
def prepared(model):
    """The float model opened once and cut to few blocks, its statistics, a trajectory."""
    source = load_transformer(model)
    blocks = source.model.transformer_blocks
    source.model.transformer_blocks = torch.nn.ModuleList(blocks[i] for i in BLOCKS)
    source.model.register_to_config(num_layers=len(BLOCKS))
    fast = replace(Recipe(), calibration=FAST)
    stats = collected(source, fast, EVERYTHING, progress=False)
    settings = SamplingSettings(samples=2, steps=3, batch_size=2, seed=7)
    requests = prompts.load("auto", source.pipeline, 2)
    return source, stats, trajectory.record(source.pipeline, source.model, requests, settings)


@pytest.mark.parametrize("name", yaml_names("recipes"))
def test_a_recipe_quantizes_saves_loads_and_samples(name, tmp_path, few_vectors):
    # dtq's own recipes must withstand outliers
    source, stats, truth = prepared("demo-outliers" if name in FAMILY else "demo")
    recipe = replace(hasty(name), calibration=FAST)
    opened = replace(source, pipeline=copy.copy(source.pipeline), model=copy.deepcopy(source.model))
    opened.pipeline.register_modules(transformer=opened.model)
    report = quantized(opened, recipe, statistics=stats, exclude=KEEP, progress=False)
    steps = trajectory.teacher_forced(truth, opened.model)
    assert sum(steps) / len(steps) < LOOSE.get(name, 0.001)
    plan = report.plan
    assert stored_bits(opened.model) == pytest.approx(
        plan.bits(
            [x for x in plan.quantized() if x.activation_format != "none"] or plan.quantized()
        )
    )
    with atomic.atomic_directory(tmp_path / "out", overwrite=False) as side:
        writer.save_into(opened.pipeline, side, "10GB")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    reader.verify(tmp_path / "out")
    before, after = (tiny.sample(p, steps=1) for p in (opened.pipeline, loaded))
    assert torch.isfinite(after).all()
    assert torch.equal(before, after)


def test_errors_come_in_the_order_of_the_bits_that_are_spent():
    """V9: a random DiT with salient channels; each thing that is left out costs."""
    pipe = tiny.pipeline()
    inject_outliers(pipe.transformer)
    settings = SamplingSettings(samples=4, steps=4, batch_size=4, seed=99)
    truth = trajectory.record(pipe, pipe.transformer, prompts.load("auto", pipe, 4), settings)

    def error(recipe: str, **overrides) -> float:
        twin = tiny.pipeline()
        inject_outliers(twin.transformer)
        dtq.quantize(twin, recipe, progress=False, **{**QUICK, **overrides})
        steps = trajectory.teacher_forced(truth, twin.transformer)
        return sum(steps) / len(steps)

    coarse = {"transform": {"search": {"step": 0.25}}}
    # the branch's own bits shrink with the width: give the narrow model rank 8
    better = error("w4a8-hq", lowrank={"svd": {"rank": 8}}, **coarse)
    plain = error("w4a8", **coarse)
    unrotated = error("w4a8", transform="smooth", promote={"to": ""})
    assert error("w8a8", **coarse) < better < plain < 1.02 * unrotated
    assert unrotated < error("rtn-w4a8")


@pytest.mark.parametrize("family", tiny.TRANSFORMERS)
def test_a_budget_is_kept_to_the_byte_and_more_is_never_worse(family):
    model = tiny.TRANSFORMERS[family]()
    errors, budgets = [], (4.5, 5.5, 8.5)
    for budget in budgets:
        twin = copy.deepcopy(model)
        few = {"samples": 2, "batch_size": 1, "steps": 4, "num_timestep_bins": 2}
        dtq.quantize(
            twin, "w4a8", progress=False, promote={"to": ""}, transform="hadamard", solver="search",
            allocate={"budget": budget, "num_inputs": 2}, calibration=few,
        )  # fmt: skip
        report = twin.hf_quantizer.report
        assert report.plan.bits(report.plan.gemm()) <= budget
        assert report.allocation["bytes"] <= report.allocation["budget"]
        errors.append(report.allocation["sensitivity"])
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[0] > 2 * errors[2]


def test_a_budget_below_the_cheapest_option_is_refused_with_the_least_there_is():
    with pytest.raises(dtq.errors.InputError, match=r"4\.\d+ bits"):
        dtq.quantize(
            tiny.dit(), "w4a8", progress=False, allocate={"budget": "3.1"}, **QUICK,
        )  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_float_model_that_is_not_finite_is_refused_by_name(bad):
    model = tiny.dit()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight[3, 5] = bad
    with pytest.raises(dtq.errors.InputError, match=r"transformer_blocks\.1\.ff\.net\.2"):
        dtq.quantize(model, "w4a16", progress=False)


def test_dead_channels_and_few_rows_are_solved_all_the_same():
    pipe = tiny.pipeline()
    with torch.no_grad():  # half of the inputs of this layer are always zero
        pipe.transformer.transformer_blocks[0].attn1.to_v.weight[:64] = 0
        pipe.transformer.transformer_blocks[0].attn1.to_v.bias[:64] = 0
    calibration = {"samples": 1, "batch_size": 1, "steps": 1, "num_timestep_bins": 1}
    dtq.quantize(pipe, "w4a8", progress=False, calibration=calibration)
    layer = pipe.transformer.transformer_blocks[0].attn1.to_out[0]
    assert torch.isfinite(layer.dequantize()).all()
    assert torch.isfinite(tiny.sample(pipe)).all()


@pytest.mark.parametrize("fmt", ["ternary-row", "trit-row"])
@pytest.mark.parametrize("packed", [False, True])
def test_trained_ternary_weights_load_run_and_save(fmt, packed, tmp_path):
    g = torch.Generator().manual_seed(0)
    model = tiny.dit()
    weights, expected = {}, {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and "transformer_blocks" in name:
            codes = torch.randint(-1, 2, linear.weight.shape, generator=g, dtype=torch.int8)
            alpha = 0.02 + 0.01 * torch.rand((), generator=g)
            expected[name] = codes.float() * alpha
            byte = (codes + 1).to(torch.uint8).chunk(4)
            four = byte[0] << 6 | byte[1] << 4 | byte[2] << 2 | byte[3]
            weights[name] = (four if packed else codes, alpha)
    plain = copy.deepcopy(model)
    for name, w in expected.items():
        plain.get_submodule(name).weight.data = w
    dtq.load_ternary(model, weights, fmt=fmt)
    x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([400, 400])
    label = torch.tensor([1, 2])
    with torch.no_grad():
        output, float_output = (m(x, timestep=t, class_labels=label)[0] for m in (model, plain))
        torch.testing.assert_close(output, float_output, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)(x, timestep=t, class_labels=label)[0]
    assert torch.equal(again, output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: {"nowhere": (codes, 1.0)}, "no linear"),
        (lambda codes: {"transformer_blocks.0.ff.net.2": (codes[:5], 1.0)}, "codes are"),
        (lambda codes: {"transformer_blocks.0.ff.net.2": (codes * 3, 1.0)}, "-1, 0 or 1"),
        (
            lambda codes: {
                "transformer_blocks.0.ff.net.2": (torch.full((32, 512), 3, dtype=torch.uint8), 1.0)
            },
            "hold a 3",
        ),
    ],
)
def test_ternary_weights_that_do_not_fit_are_refused(change, message):
    with pytest.raises(dtq.errors.InputError, match=message):
        dtq.load_ternary(tiny.dit(), change(torch.ones(128, 512, dtype=torch.int8)))
