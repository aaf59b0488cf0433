# SPDX-License-Identifier: Apache-2.0
"""Files come back: export, import, export gives equal bytes; damaged files are refused."""

from __future__ import annotations

import json
import random

import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import QUICK, hasty
from engine_models import FAMILIES, error, largest_file, output, quantized, stored_files
from safetensors import safe_open
from safetensors.torch import save_file

import dtq
from dtq.cli import main
from dtq.cli.inputs import source_of
from dtq.engines import TARGETS
from dtq.engines.load import load_float
from dtq.errors import CheckpointError, DtqError, InputError
from dtq.nn import QuantLinear
from dtq.pipelines.tracing import dummy_inputs

READ = [name for name, target in TARGETS.items() if target.read]


@pytest.fixture(scope="module", params=READ)
def target(request):
    if TARGETS[request.param].missing:
        pytest.skip(f"needs {TARGETS[request.param].missing}: see docs/engines/README.md")
    return TARGETS[request.param]


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, target, tmp_path_factory):
    """The quantized model and its file."""
    _, made = quantized(request.param, target.limits.recipe, target.name)
    file = tmp_path_factory.mktemp(target.name) / f"{request.param}{target.suffix}"
    dtq.export(made, target.name, file)
    return made, file


def test_export_import_export_gives_equal_bytes(exported, target, tmp_path):
    _, file = exported
    again = tmp_path / f"again{target.suffix}"
    dtq.export(dtq.load(file), target.name, again)
    assert stored_files(again) == stored_files(file)


def test_the_loaded_model_gives_the_same_bits(exported, tmp_path):
    made, file = exported
    loaded = dtq.load(file)
    assert any(isinstance(module, QuantLinear) for module in loaded.modules())
    inputs = dummy_inputs(made, 2, 500, 1)
    assert torch.equal(output(loaded, inputs), output(made, inputs))
    loaded.save_pretrained(tmp_path / "saved")
    saved = type(made).from_pretrained(tmp_path / "saved")
    assert torch.equal(output(saved, inputs), output(made, inputs))


def test_a_config_may_be_given_as_mapping_file_or_folder(target, tmp_path):
    model, made = quantized("dit", target.limits.recipe, target.name)
    file = tmp_path / f"model{target.suffix}"
    dtq.export(made, target.name, file)
    model.save_config(tmp_path)
    inputs = dummy_inputs(made, 2, 500, 1)
    want = output(made, inputs)
    for config in (
        dict(model.config) | {"_class_name": type(model).__name__},
        tmp_path,
        tmp_path / "config.json",
    ):
        assert torch.equal(output(dtq.load(file, config), inputs), want)
    other = tiny.dit(blocks=3, heads=8)
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.2.* is missing"):
        dtq.load(file, dict(other.config) | {"_class_name": type(other).__name__})
    other = tiny.dit(blocks=1, heads=8)
    with pytest.raises(CheckpointError, match=r"tensors are not of the model|has no linear"):
        dtq.load(file, dict(other.config) | {"_class_name": type(other).__name__})
    with pytest.raises(InputError, match="no such file"):
        dtq.load(file, tmp_path / "none")


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.gguf").write_text("GGUF is not what this is")
    for name, what in (
        ("plain.safetensors", "none of the formats"),
        ("none", "no such file"),
        ("text.gguf", "GGUF version|damaged"),
    ):
        with pytest.raises(DtqError, match=what):
            dtq.load(tmp_path / name)


def test_a_comfy_file_without_metadata_asks_for_a_config_and_has_its_name_for_a_recipe(tmp_path):
    model, made = quantized("dit", "convrot-w8a8", "comfy-int8")
    file = tmp_path / "model.safetensors"
    dtq.export(made, "comfy-int8", file)
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file(tensors, file)
    with pytest.raises(InputError, match="--config FOLDER"):
        dtq.load(file)
    loaded = dtq.load(file, dict(model.config) | {"_class_name": type(model).__name__})
    assert loaded.hf_quantizer.quantization_config.recipe == "model"


def damage(data: bytes, rng: random.Random) -> bytes:
    """A file that is cut, has changed bytes, or lacks some."""
    kind, head = rng.randrange(4), min(len(data), 40_000)
    changed = bytearray(data)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        start = rng.randrange(head)
        del changed[start : start + rng.randrange(1, 64)]
    for _ in range(rng.choice((1, 3, 20))):
        changed[rng.randrange(head if kind < 3 else len(changed))] = rng.randrange(256)
    return bytes(changed)


def test_damaged_files_are_loaded_or_refused(target, tmp_path):
    """Whatever is wrong with a file, the error is one of dtq; scripts/fuzz covers more files."""
    _, made = quantized("dit", target.limits.recipe, target.name)
    file = tmp_path / f"model{target.suffix}"
    dtq.export(made, target.name, file)
    damaged = largest_file(file)
    data, refused = damaged.read_bytes(), 0
    for seed in range(60):
        damaged.write_bytes(damage(data, random.Random(seed)))
        try:
            dtq.load(file)
        except DtqError:
            refused += 1
    assert refused > 20


def test_a_file_is_the_source_of_another_quantization(tmp_path):
    pipe, folder = tiny.pipeline(heads=8), tmp_path / "pipe"
    pipe.save_pretrained(folder)
    quantized_pipe = dtq.quantize(pipe, hasty("convrot-w8a8"), to="comfy-int8", progress=False)
    file = tmp_path / "model.safetensors"
    dtq.export(quantized_pipe, "comfy-int8", file)
    source = load_float(file, folder)
    inputs = dummy_inputs(source.transformer, 2, 500, 1)
    want = output(quantized_pipe.transformer, inputs)
    assert error(output(source.transformer, inputs), want) < 1e-3
    quick = [f"--set=calibration.{key}={value}" for key, value in QUICK["calibration"].items()]
    line = ["quantize", str(file), "--config", str(folder), "--recipe", "gguf-q4", "--to", "gguf"]
    result = CliRunner().invoke(main, [*line, *quick, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    made = dtq.load(tmp_path / "out" / "engines" / "transformer-gguf.gguf")
    assert 0 < error(output(made, inputs), want) < 0.05
    result = CliRunner().invoke(
        main, ["quantize", "demo", "--config", "x", "-o", str(tmp_path / "o")]
    )
    assert "is for files of other engines" in result.output
    assert source_of(str(file), folder, "bf16").transformer.dtype == torch.bfloat16
    assert source_of(str(file), None, "bf16").dtype == torch.bfloat16
    line = ["quantize", str(file), "--component", "transformer_2", "-o", str(tmp_path / "o")]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 1
    assert "names a model of a pipeline" in result.output
    result = CliRunner().invoke(main, ["plan", str(file)])
    assert "dtq quantize FILE --config FOLDER" in result.output


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_an_unknown_name_is_found_before_the_model_is_loaded(command, tmp_path):
    line = [command, str(tmp_path / "not there"), "--to", "ggml"]
    result = CliRunner().invoke(main, line + ["-o", str(tmp_path / "o")] * (command == "quantize"))
    assert result.exit_code == 1
    assert "'ggml' is not a target of dtq export" in result.output
    line[2:] = ["--text-encoder", "w9"]
    result = CliRunner().invoke(main, line + ["-o", str(tmp_path / "o")] * (command == "quantize"))
    assert result.exit_code == 1
    assert "unknown recipe 'w9'" in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "float_of_tomorrow"}, "to_q.comfy_quant is 'float_of_tomorrow'; dtq reads"),
        ({"convrot_groupsize": 6}, "not a power of 4"),
        ({"convrot_groupsize": 4096}, "does not divide"),
        ({"convrot_groupsize": "64"}, "not a power of 4"),
    ],
)
def test_markers_are_checked(changes, message, tmp_path):
    _, made = quantized("dit", "convrot-w8a8", "comfy-int8")
    file = tmp_path / "model.safetensors"
    dtq.export(made, "comfy-int8", file)
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    key = "transformer_blocks.0.attn1.to_q.comfy_quant"
    text = json.loads(bytes(tensors[key].tolist())) | changes
    tensors[key] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
    save_file(tensors, file, metadata)
    with pytest.raises(DtqError, match=message):
        dtq.load(file)
