# SPDX-License-Identifier: Apache-2.0
"""``dtq eval --candidate-engine`` runs the file of an engine by the engine's own package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil

import pytest
import tiny
import torch
from click.testing import CliRunner
from engine_models import output, quantized

import dtq
from dtq.cli import main
from dtq.engines import TARGETS
from dtq.engines.candidate import files_of, run_in
from dtq.engines.onnx_graph import constants_of
from dtq.engines.runtimes import ENGINES, find_engine, run_by
from dtq.engines.runtimes.graph import Graph, as_model
from dtq.errors import CheckpointError, InputError
from dtq.evaluate import run_file
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.tracing import dummy_inputs

needs_kitchen = pytest.mark.skipif(
    importlib.util.find_spec("comfy_kitchen") is None,
    reason="needs comfy-kitchen: see docs/engines/README.md",
)
SHORT = ["--samples", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a float pipeline."""
    folder = tmp_path_factory.mktemp("pipeline") / "float"
    tiny.pipeline(heads=8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Its transformer in ComfyUI's int8."""
    _, made = quantized("dit", "convrot-w8a8", "comfy-int8")
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    dtq.export(made, "comfy-int8", path)
    return path


def evaluated(*line: str) -> str:
    result = CliRunner().invoke(main, ["eval", *map(str, line)])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_engine_runs_targets_and_is_in_the_help():
    text = CliRunner().invoke(main, ["eval", "--help"]).output
    for name, engine in ENGINES.items():
        assert name in text
        assert set(engine.runs) <= set(TARGETS)
    assert {name for engine in ENGINES.values() for name in engine.runs} == set(TARGETS)


@needs_kitchen
def test_eval_and_gate_judge_what_the_engine_runs(pipeline, file, tmp_path, monkeypatch):
    calls = []
    linear = torch.nn.functional.linear

    def counted(x, weight, bias=None):
        calls.append(type(weight).__name__)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    engine = ["--candidate-engine", "comfy-kitchen", "--components"]
    printed = evaluated(file, "--reference", pipeline, *engine, *SHORT, "-o", tmp_path / "theirs")
    assert calls.count("QuantizedTensor") > 8
    assert "comfy-kitchen 0." in printed
    evaluated(file, "--reference", pipeline, *SHORT, "-o", tmp_path / "ours")
    theirs, ours = (run_file.read(tmp_path / name) for name in ("theirs", "ours"))
    assert theirs.conditions["engine"] == ENGINES["comfy-kitchen"].versions
    assert "engine" not in ours.conditions
    assert [part.component for part in theirs.components] == ["transformer"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for run in (theirs, ours):
        assert run.identity["sha256"] == digest
        assert run.identity["file"] == file.name
        assert run.identity["recipe"] == "convrot-w8a8"
    rows = [
        json.loads((tmp_path / n / "eval.json").read_text())["rows"][0] for n in ("theirs", "ours")
    ]
    assert theirs.components[0].error == pytest.approx(rows[0]["error"])
    assert rows[0]["bits"] == rows[1]["bits"]
    assert 0 < rows[0]["error"] < 0.01
    assert rows[0]["error"] != rows[1]["error"]
    assert rows[0]["error"] == pytest.approx(rows[1]["error"], rel=0.1)
    line = ["gate", tmp_path / "theirs", "--baseline", tmp_path / "ours"]
    verdict = CliRunner().invoke(main, [str(each) for each in line]).output
    assert f"engine: {ENGINES['comfy-kitchen'].versions} in the run, dtq in the baseline" in verdict


@needs_kitchen
def test_a_pipeline_folder_has_the_files_of_its_transformers(pipeline, file, tmp_path):
    folder = tmp_path / "made"
    shutil.copytree(pipeline, folder)
    engine = find_engine("comfy-kitchen")
    with pytest.raises(InputError, match="has no file that comfy-kitchen runs; quantize with --to"):
        files_of(engine, folder)
    (folder / "engines").mkdir()
    own = folder / "engines" / "transformer-comfy-int8.safetensors"
    shutil.copy(file, own)
    assert files_of(engine, folder) == {"transformer": own}
    shutil.copy(file, folder / "engines" / "transformer-comfy-w4a8.safetensors")
    with pytest.raises(InputError, match="has several files for comfy-kitchen"):
        files_of(engine, folder)


def test_what_an_engine_cannot_run_is_refused(file, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is no engine; did you mean comfy-kitchen"):
        find_engine("comfy-kitchn")
    with pytest.raises(InputError, match="comfy-int8 file, and gguf runs gguf"):
        files_of(ENGINES["gguf"], file)
    with pytest.raises(InputError, match="no such file"):
        files_of(ENGINES["gguf"], tmp_path / "none.gguf")
    loaded = load_transformer(tiny.two_stages())
    with pytest.raises(
        InputError, match="a file holds one: give the output folder of dtq quantize"
    ):
        run_in(ENGINES["dtq"], loaded, {"": file}, "file")
    with pytest.raises(CheckpointError, match="has no linear"):
        run_by("dtq", file, tiny.sd3(heads=8))
    monkeypatch.setattr("dtq.engines.runtimes.engine.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match="torchao needs torchao and diffusers: pip install torchao"
    ):
        find_engine("torchao")


def test_a_graph_gets_the_arguments_that_it_was_made_with():
    model = tiny.dit()
    given = dummy_inputs(model, 2, 500, 0)
    dtypes = {name: value.dtype for name, value in given.items()}
    seen = []

    def run(tensors):
        seen.append(tensors)
        return output(model, tensors).double()

    made = as_model(Graph(dtypes, run, constants_of({**given, "return_dict": False})), model)
    want = output(model, given)
    assert torch.equal(output(made, given), want)
    assert torch.equal(made(*given.values()).sample, want)  # by position, with an output class
    assert len(seen) == 2
    assert next(made.parameters()) is next(model.parameters())
    with pytest.raises(InputError, match="does not pass its input timestep"):
        made(given["hidden_states"], class_labels=given["class_labels"])
    with pytest.raises(InputError, match="passes class_labels, which is no input of it"):
        as_model(Graph({"hidden_states": torch.float32}, run, {}), model)(
            given["hidden_states"], class_labels=given["class_labels"]
        )
    with pytest.raises(InputError, match=r"made with \{'frames': 5\}"):
        as_model(Graph(dtypes, run, constants_of({"frames": 5})), model)(**given)
