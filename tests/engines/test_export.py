# SPDX-License-Identifier: Apache-2.0
"""What an engine cannot hold is refused by name, before calibration where the recipe shows it."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import QUICK, hasty
from engine_models import error, output, quantized, stored_files
from safetensors import safe_open

import dtq
from dtq.cli import main
from dtq.engines import TARGETS, find_target
from dtq.engines.target import StoredLayer
from dtq.errors import InputError, RecipeError
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.nn.attention import use_int8_attention
from dtq.pipelines.tracing import dummy_inputs
from dtq.plan.layers import LayerSpec
from dtq.recipe import Recipe
from dtq.transforms import TRANSFORMS


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_names_entries_of_the_tables(name):
    limits = TARGETS[name].limits
    assert set(limits.formats) <= set(FORMATS)
    assert {each for runs in limits.formats.values() for each in runs} <= set(ACTIVATION_FORMATS)
    assert set(limits.transforms) <= set(TRANSFORMS)
    assert set(limits.fallbacks) <= {f for f, runs in limits.formats.items() if "none" in runs}
    assert Recipe.load(limits.recipe).weights in limits.formats


@pytest.mark.parametrize("name", TARGETS)
def test_the_recipe_of_a_target_fits_it(name, tmp_path):
    if TARGETS[name].missing:
        pytest.skip(f"needs {TARGETS[name].missing}: see docs/engines/README.md")
    _, made = quantized("dit", TARGETS[name].limits.recipe, name)
    report = dtq.export(made, name, tmp_path / f"model{TARGETS[name].suffix}")
    paths = TARGETS[name].paths(report.file)
    assert report.nbytes == sum(len(data) for p in paths for data in stored_files(p).values())
    assert not report.as_float
    assert len(report.layers) > 8


def test_the_plan_shows_what_is_adapted():
    line = ["plan", "demo", "--recipe", "convrot-w8a8", "--set", "modulation=w8a16"]
    result = CliRunner().invoke(main, [*line, "--to", "comfy-int8"])
    assert result.exit_code == 0, result.output
    assert "int8-row for comfy-int8: weights int8-g64" in result.output
    result = CliRunner().invoke(main, ["plan", "demo", "--recipe", "w4a8", "--to", "comfy-int8"])
    assert "--recipe convrot-w8a8" in result.output


def test_a_recipe_that_does_not_fit_is_refused_before_calibration():
    model = tiny.dit()
    overrides = {"step_policy": {"precisions": ["a8", "a16"]}}
    with pytest.raises(RecipeError) as caught:
        dtq.quantize(model, "w4a8", to="comfy-int8", progress=False, **overrides)
    text = str(caught.value)
    for part in ("step_policy.precisions=[]", "transform_candidates=[]", "to_q and", "int4-2l-g64"):
        assert part in text
    assert "--recipe convrot-w8a8" in text
    assert not getattr(model, "is_quantized", False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transform": "search"}, "transform search"),
        ({"activations": "int8-static"}, "activations int8-static"),
        ({"lowrank": "svd"}, "a low-rank branch"),
        ({"attention": "int8"}, "attention: a file for comfy-int8 cannot say"),
        ({"promote": {"to": "int8-g64"}}, "promote.to: comfy-int8 cannot hold int8-g64"),
    ],
)
def test_every_part_that_does_not_fit_is_named(changes, reason):
    with pytest.raises(RecipeError, match=reason):
        dtq.quantize(tiny.dit(), "convrot-w8a8", to="comfy-int8", progress=False, **changes)


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        (
            "comfy-svdquant",
            {"weights": "int8-row", "activations": "int8-row", "transform": "none"},
            "a low-rank branch, which it does not have in int8-row with int8-row activations",
        ),
        (
            "comfy-svdquant",
            {"weights": "int8-row", "activations": "int8-row", "lowrank": "none"},
            "only layers with int4-g64 weights and int4-g64 activations have smoothing there",
        ),
        (
            "nunchaku-lite",
            {"activations": "none", "transform": "none"},
            "a low-rank branch, which it does not have in int4-g64 with none activations",
        ),
        (
            "nunchaku-lite",
            {"activations": "none", "lowrank": "none"},
            "only layers with int4-g64 weights and int4-g64 activations have smoothing there",
        ),
    ],
)
def test_smoothing_and_branches_are_refused_in_layers_without_them(target, changes, reason):
    """Before calibration; and in a checkpoint, whose branch would be lost."""
    with pytest.raises(RecipeError, match=reason):
        dtq.quantize(tiny.dit(heads=8), "svdquant-w4a4", to=target, progress=False, **changes)
    kinds = [changes.get(key, "int4-g64") for key in ("weights", "activations")]
    plain = StoredLayer(LayerSpec(*kinds), (256, 256), {})
    assert TARGETS[target].unsupported_reason(plain) is None
    with_branch = replace(plain, spec=LayerSpec(*kinds, rank=8))
    assert TARGETS[target].unsupported_reason(with_branch) == "it has a low-rank branch"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transform": "search"}, "transform search: the engine has smoothing alone"),
        ({"transform": "smooth"}, "transform={smooth: {divisor: true}}"),
        ({"lowrank": {"svd": {"rank": 8}}}, "lowrank: svd gives each layer a branch of its own"),
    ],
)
def test_smoothing_and_branches_that_do_not_fit_are_named(changes, reason):
    with pytest.raises(RecipeError, match=re.escape(reason)):
        dtq.quantize(
            tiny.flux(), "svdquant-w4a4", to="comfy-svdquant", progress=False,
            **changes,
        )  # fmt: skip


def test_what_the_recipe_leaves_to_dtq_is_adapted_with_a_note():
    _, made = quantized("dit", "convrot-w8a8", "comfy-int8", modulation="w8a16")
    layers = made.hf_quantizer.report.plan.quantized()
    changed = [layer for layer in layers if layer.role == "adaln"]
    assert changed
    for layer in changed:
        assert (layer.weight_format, layer.activation_format) == ("int8-row", "none")
        assert "for comfy-int8: weights int8-g64" in layer.note


@pytest.fixture(scope="module")
def other(float_folder):
    """A checkpoint that no target holds as it is: smoothing, two-level integers, groups."""
    return dtq.quantize(float_folder, hasty("w4a8", transform_candidates=[]), progress=False)


def test_a_checkpoint_that_does_not_fit_is_refused_with_every_reason(other, tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(InputError) as caught:
        dtq.export(other, "comfy-int8", file)
    text = str(caught.value)
    for part in ("weights are int4-2l-g64", "weights are int8-g64", "--unsupported float"):
        assert part in text
    assert not file.exists()


def test_layers_that_do_not_fit_become_float_on_request(tmp_path):
    model, made = quantized("dit", "convrot-w8a8", "comfy-int8", lowrank="none")
    name = next(n for n, m in made.named_modules() if isinstance(m, dtq.QuantLinear))
    layer = made.get_submodule(name)
    layer.add_rank(torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2))
    try:
        with pytest.raises(InputError, match=f"{name}: it has a low-rank branch"):
            dtq.export(made, "comfy-int8", tmp_path / "a.safetensors")
        file = tmp_path / "b.safetensors"
        report = dtq.export(made, "comfy-int8", file, unsupported="float")
        assert report.as_float == {name: "it has a low-rank branch"}
        with safe_open(file, framework="pt") as opened:
            assert torch.equal(opened.get_tensor(f"{name}.weight"), layer.dequantize())
            assert f"{name}.comfy_quant" not in opened.keys()  # noqa: SIM118
    finally:
        layer.remove_rank(0, 2)
    inputs = dummy_inputs(model, 2, 500, 0)
    assert error(output(made, inputs), output(model, inputs)) < 1e-3


def test_names_are_checked(quantized_folder, float_folder, tmp_path):
    with pytest.raises(InputError, match="not a target of dtq export; did you mean comfy-int8"):
        find_target("comfy-int")
    with pytest.raises(InputError, match=r"writes a \.safetensors file"):
        dtq.export(quantized_folder, "comfy-int8", tmp_path / "model.gguf")
    with pytest.raises(InputError, match="no such folder"):
        dtq.export(tmp_path / "none", "comfy-int8", tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="not quantized by dtq"):
        dtq.export(tiny.dit(), "comfy-int8", tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="not quantized by dtq"):
        dtq.export(float_folder, "comfy-int8", tmp_path / "a.safetensors")
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(InputError, match="exists"):
        dtq.export(quantized_folder, "comfy-int8", tmp_path / "there.safetensors")


def test_the_command_line_quantizes_and_exports_the_same_file(float_folder, tmp_path):
    out, file = tmp_path / "out", tmp_path / "again.safetensors"
    quick = [f"--set=calibration.{key}={value}" for key, value in QUICK["calibration"].items()]
    run = CliRunner().invoke
    line = ["quantize", str(float_folder), "--recipe", "convrot-w8a8", "--to", "comfy-int8"]
    result = run(main, [*line, *quick, "--no-sanity-check", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "for comfy-int8:" in result.output
    result = run(main, ["export", str(out), "--to", "comfy-int8", "-o", str(file), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert set(report["layers"].values()) == {"int8-row"}
    first = out / "engines" / "transformer-comfy-int8.safetensors"
    assert first.read_bytes() == file.read_bytes()
    listed = run(main, ["export", "--list"])
    assert all(name in listed.output for name in TARGETS)
    assert all(target.loss.lacks in listed.output for target in TARGETS.values())


@pytest.mark.parametrize("name", TARGETS)
def test_the_page_of_a_target_has_what_dtq_export_says_is_lost(name):
    page = Path(__file__).parents[2] / "docs" / "engines" / f"{name}.md"
    _, _, lost = page.read_text().partition("## What is lost")
    loss = TARGETS[name].loss
    measured = [
        "not measured" if ratio is None else f"{ratio:.2f} times that of `{loss.own}`"
        for ratio in (loss.demo, loss.outliers)
    ]
    assert (
        f"Squared error on `demo`: {measured[0]}; on `demo-outliers`: {measured[1]}."
        in " ".join(lost.split())
    )


def test_a_refused_export_keeps_the_checkpoint(float_folder, tmp_path, monkeypatch):
    target = TARGETS["comfy-int8"]
    refuses = replace(target, unsupported_reason=lambda layer: "it is a test")
    monkeypatch.setitem(TARGETS, "comfy-int8", refuses)
    out = tmp_path / "out"
    quick = [f"--set=calibration.{key}={value}" for key, value in QUICK["calibration"].items()]
    line = ["quantize", str(float_folder), "--recipe", "convrot-w8a8", "--to", "comfy-int8"]
    result = CliRunner().invoke(main, [*line, *quick, "--no-sanity-check", "-o", str(out)])
    assert result.exit_code == 1
    assert "it is a test" in result.output
    assert f"dtq export {out} --to comfy-int8 --unsupported float" in " ".join(
        result.output.split()
    )
    monkeypatch.undo()
    assert dtq.export(out, "comfy-int8", tmp_path / "a.safetensors").layers


def test_export_warns_that_int8_attention_is_lost(tmp_path, caplog):
    _, made = quantized("dit", "convrot-w8a8", "comfy-int8")
    try:
        use_int8_attention(made, ["transformer_blocks.0.attn1"])
        with caplog.at_level(logging.WARNING, "dtq"):
            dtq.export(made, "comfy-int8", tmp_path / "a.safetensors")
    finally:
        use_int8_attention(made, [])
    assert "1 modules compute their attention in int8" in caplog.text
