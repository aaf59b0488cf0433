# SPDX-License-Identifier: Apache-2.0
"""Text encoders in NF4 of bitsandbytes: they load without dtq; a clear error without the package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pipelines
import pytest
from click.testing import CliRunner
from diffusers import DiffusionPipeline

from dtq.cli import main
from dtq.evaluate.embeddings import embedding_errors, quantized_text_encoders
from dtq.pipelines import prompts
from dtq.pipelines.loading import load_transformer, text_encoders_of
from dtq.pipelines.settings import SamplingSettings
from dtq.stages.text_nf4 import nf4_bytes

OPTIONS = ["--recipe=rtn-w4a8", "--samples=1", "--steps=1", "--text-encoder=bnb-nf4"]
OPTIONS += ["--arg=height=16", "--arg=width=16", "--arg=max_sequence_length=16"]
HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.skipif(not HAS_BNB, reason="needs bitsandbytes")
def test_a_pipeline_with_nf4_text_encoders_loads_without_dtq(tmp_path):
    pipe, out = pipelines.flux(), tmp_path / "q"
    pipe.save_pretrained(tmp_path / "float")
    result = run("quantize", tmp_path / "float", *OPTIONS, "--no-sanity-check", "-o", out)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "dtq_report.json").read_text())
    assert report["bitsandbytes"]["text_encoder"]["layers"] == 12 - 2  # 2 have 32 inputs
    assert "`text_encoder_2` is stored in NF4 of bitsandbytes" in (out / "README.md").read_text()
    for text in text_encoders_of(load_transformer(pipe)):
        (file,) = (out / text.component).glob("*.safetensors")
        assert 0.9 * nf4_bytes(text) < file.stat().st_size <= nf4_bytes(text)
        config = json.loads((out / text.component / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "bitsandbytes"
        assert "dtq" not in json.dumps(config)
    code = "import sys, transformers as t; t.T5EncoderModel.from_pretrained(sys.argv[1]); "
    code += "assert 'dtq' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, out / "text_encoder_2"], check=True)
    again = load_transformer(out)
    assert {*quantized_text_encoders(again)} == {"text_encoder", "text_encoder_2"}
    settings = SamplingSettings(prompts="prompts-64", samples=1, batch_size=1, steps=1)
    requests = prompts.load("prompts-64", pipe, 1)
    errors = embedding_errors(again, load_transformer(pipe), requests, settings)
    assert all(1e-5 < error < 0.1 for error in errors.values())
    assert isinstance(again.pipeline, DiffusionPipeline)
    assert pipelines.sample(again.pipeline, "flux", 1).isfinite().all()


def test_without_bitsandbytes_it_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = run("quantize", tmp_path / "nothing", *OPTIONS, "-o", tmp_path / "q")
    assert result.exit_code == 1
    assert "this needs bitsandbytes: pip install bitsandbytes" in result.stderr
