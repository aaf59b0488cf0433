# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines: the text encoders are quantized in the run that quantizes the transformer."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pipelines
import pytest
import torch
from conftest import hasty
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.pipelines.ideogram4 import pipeline_ideogram4

import dtq
from dtq.calibrate.engine import calibration_run
from dtq.cli import main
from dtq.errors import InputError
from dtq.evaluate.embeddings import embedding_errors, quantized_text_encoders
from dtq.nn import QuantLinear
from dtq.pipelines import prompts, sampling
from dtq.pipelines.loading import load_transformer, text_encoders_of
from dtq.pipelines.settings import SamplingSettings
from dtq.pipelines.tracing import dummy_inputs

QUICK = {"calibration": {"samples": 2, "batch_size": 1, "steps": 2, "prompts": "prompts-64"}}
SETTINGS = SamplingSettings(prompts="prompts-64", samples=2, batch_size=1, steps=2)


def layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A Flux pipeline and its folder, quantized with CLIP and T5."""
    pipe = pipelines.flux()
    dtq.quantize(pipe, "rtn-w4a8", text_encoder="w4a16", progress=False, **QUICK)
    folder = tmp_path_factory.mktemp("flux") / "q"
    pipe.save_pretrained(folder)
    return pipe, folder


def test_a_whole_pipeline_loads_as_it_was_saved(flux):
    pipe, folder = flux
    again = DiffusionPipeline.from_pretrained(folder)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        assert layers(getattr(again, name))
        assert layers(getattr(again, name)) == layers(getattr(pipe, name))
    assert not layers(again.vae)
    want, got = (pipelines.sample(each, "flux") for each in (pipe, again))
    assert torch.equal(want, got)


def test_keep_leaves_the_text_encoders_alone():
    pipe, kept = pipelines.flux(), pipelines.flux()
    dtq.quantize(pipe, "rtn-w4a8", progress=False, **QUICK)
    assert layers(pipe.transformer)
    for name in ("text_encoder", "text_encoder_2"):
        state, want = getattr(pipe, name).state_dict(), getattr(kept, name).state_dict()
        assert all(torch.equal(state[key], want[key]) for key in want)


def test_text_encoders_see_the_prompts_and_the_denoiser_is_not_run():
    loaded = load_transformer(pipelines.flux())
    seen, steps = {}, []
    loaded.model.register_forward_hook(lambda *_: steps.append(1))
    for text in text_encoders_of(loaded):
        ids = seen.setdefault(text.component, [])
        text.model.register_forward_pre_hook(
            lambda module, args, kwargs, ids=ids: ids.append((args or tuple(kwargs.values()))[0]),
            with_kwargs=True,
        )
    text = text_encoders_of(loaded)[0]
    run = calibration_run(text, SETTINGS)
    for batch in range(run.batches):
        run.run(batch)
    assert not steps
    assert {name: len(ids) for name, ids in seen.items()} == {
        "text_encoder": 2, "text_encoder_2": 2,
    }  # fmt: skip
    want = loaded.pipeline.tokenizer(
        list(prompts.load("prompts-64", loaded.pipeline, 2).entries),
        padding="max_length", truncation=True, return_tensors="pt",
        max_length=loaded.pipeline.tokenizer_max_length,
    ).input_ids  # fmt: skip
    assert torch.equal(torch.cat(seen["text_encoder"]), want)


class LatePrompts(FluxPipeline):
    """Encodes for T5 after the first step, as pipelines of two stages do for the second one."""

    def __call__(self, prompt=None, generator=None, output_type="pil"):
        ids = self.tokenizer(prompt, padding=True, return_tensors="pt").input_ids
        arguments = dummy_inputs(self.transformer, len(prompt), 0.5, 0)
        for encoder in (self.text_encoder, self.text_encoder_2.encoder):  # a part of the second
            encoder(ids)
            self.transformer(**arguments)


def test_text_encoders_that_are_called_after_the_first_step():
    pipe = LatePrompts(**pipelines.flux().components)
    steps = []
    pipe.transformer.register_forward_hook(lambda *_: steps.append(1))
    for text in text_encoders_of(load_transformer(pipe)):
        seen = []
        linear = next(m for m in text.model.modules() if isinstance(m, torch.nn.Linear))
        linear.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        calibration_run(text, SETTINGS).run(0)
        assert len(seen) == 1
    assert len(steps) == 2  # one in each run; the second step is not taken


def test_an_encoder_whose_layers_the_pipeline_runs_one_by_one(monkeypatch, caplog):
    monkeypatch.setattr(pipeline_ideogram4, "QWEN3_VL_ACTIVATION_LAYERS", (0, 1))
    pipe = pipelines.ideogram4()
    small = {
        "height": 32, "width": 32, "guidance_schedule": None, "guidance_scale": 2.0,
        "max_sequence_length": 512,
    }  # fmt: skip
    calibration = {**QUICK["calibration"], "pipeline_args": small}
    run = partial(dtq.quantize, pipe, "rtn-w4a8", progress=False, calibration=calibration)
    with pytest.raises(InputError, match="runs the layers of text_encoder one by one"):
        run(text_encoder=hasty("w4a8", finetune="blocks"))
    run(text_encoder=hasty("w4a8"))
    assert len(layers(pipe.text_encoder)) == 2 * 7
    assert not [name for name in layers(pipe.text_encoder) if "visual" in name]
    assert pipe.text_encoder.hf_quantizer.report.calibration["calls"] == 2  # one for each prompt
    messages = caplog.text
    assert "one by one, and there are no whole calls to compare" in messages
    assert "text_encoder was not called as a whole, and is not checked" in messages


def test_the_error_of_embeddings(flux):
    pipe, _ = flux
    candidate, reference = load_transformer(pipe), load_transformer(pipelines.flux())
    requests = prompts.load("prompts-64", reference.pipeline, 2)
    errors = embedding_errors(candidate, reference, requests, SETTINGS)
    assert (
        set(errors) == {"text_encoder", "text_encoder_2"} == {*quantized_text_encoders(candidate)}
    )
    assert all(1e-6 < error < 0.1 for error in errors.values())
    assert embedding_errors(reference, reference, requests, SETTINGS) == {}


def test_every_batch_of_prompts_is_encoded_once(flux, monkeypatch):
    pipe, _ = flux
    candidate, reference = load_transformer(pipe), load_transformer(pipelines.flux())
    settings = replace(SETTINGS, samples=3, batch_size=2)
    requests = prompts.load("prompts-64", reference.pipeline, 3)
    runs, before = [], sampling.run_pipeline
    monkeypatch.setattr(
        sampling, "run_pipeline", lambda *args: runs.append(args[-1]) or before(*args)
    )
    embedding_errors(candidate, reference, requests, settings)
    assert runs == [[0], [2]]


def test_a_pipeline_without_a_text_encoder_is_refused(float_folder):
    with pytest.raises(InputError, match="has no text encoder; leave"):
        dtq.quantize(float_folder, "rtn-w4a8", text_encoder="w8a8", progress=False)


def command(*arguments):
    assert main([str(each) for each in arguments], standalone_mode=False) in (None, 0)


def test_the_commands(tmp_path, capsys):
    source, out = tmp_path / "float", tmp_path / "q"
    pipelines.flux().save_pretrained(source)
    run = ["--recipe", "rtn-w4a8", "--text-encoder", "w4a16", "--samples", 2, "--steps", 2]
    command("plan", source, *run, "--json")
    planned = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    command("quantize", source, *run, "--vae", "w8", "-o", out, "--json")
    report = json.loads((out / "dtq_report.json").read_text())
    names = {"transformer", "text_encoder", "text_encoder_2"}
    assert {*planned} == names
    assert {*report} == {*names, "vae", "pipeline"}
    assert {*report["pipeline"]["components"]} == {*names, "vae"}
    for name in names:
        (file,) = (out / name).glob("*.safetensors")
        assert file.stat().st_size == planned[name]["bytes"]
    assert "`text_encoder_2`: calibration inputs: pipeline" in (out / "README.md").read_text()
    capsys.readouterr()
    command("inspect", out, "--json")
    shown = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {*shown} == {*names, "vae"}
    assert shown["text_encoder"]["recipe"] == "w4a16"
    with pytest.raises(InputError, match=r"cannot hold these layers: transformer_blocks"):
        dtq.export(out, "comfy-int8", tmp_path / "t.safetensors")  # of the transformer
