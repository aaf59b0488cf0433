# SPDX-License-Identifier: Apache-2.0
"""What each component of a quantized pipeline adds to the error."""

from __future__ import annotations

import copy
import math

import pipelines
import pytest
from click.testing import CliRunner

import dtq
from dtq.cli import main
from dtq.errors import InputError
from dtq.evaluate import run_file
from dtq.evaluate.evaluate import evaluate
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.settings import SamplingSettings

SMALL = {**pipelines.SMALL["flux"], "max_sequence_length": 16}
HOW = SamplingSettings(prompts="prompts-64", samples=3, steps=2, batch_size=2, pipeline_args=SMALL)


@pytest.fixture(scope="module")
def result():
    """Of a Flux pipeline whose CLIP, transformer and autoencoder are quantized, and T5 is not."""
    floats = pipelines.flux()
    pipe = copy.deepcopy(floats)
    calibration = {"samples": 1, "batch_size": 1, "steps": 1, "pipeline_args": SMALL}
    dtq.quantize(
        pipe, "rtn-w4a8", text_encoder="w4a16", vae="w8", calibration=calibration,
        progress=False, sanity_check=False,
    )  # fmt: skip
    pipe.text_encoder_2 = floats.text_encoder_2
    parts = dict(floats.components)
    found = evaluate(load_transformer(pipe), load_transformer(floats), HOW, components=True)
    assert all(floats.components[name] is part for name, part in parts.items())
    assert "forward" not in vars(floats.transformer)
    return found


def test_every_quantized_component_is_measured_alone(result):
    rows = {row.component: row for row in result.run.components}
    assert {*rows} == {"transformer", "text_encoder", "vae"}
    assert rows["transformer"].error == pytest.approx(result.rows[0].error)
    assert 0 < rows["text_encoder"].error < 0.1
    assert rows["transformer"].share + rows["text_encoder"].share == pytest.approx(1)
    assert (rows["vae"].error, rows["vae"].share, rows["vae"].divergence) == (None, None, 0)
    for row in rows.values():
        assert row.divergence > 0 or row.component == "vae"
        assert row.psnr >= result.rows[0].psnr - 3  # of the whole pipeline


def test_a_float_model_has_no_component_to_measure():
    floats = load_transformer(pipelines.flux())
    with pytest.raises(InputError, match="no quantized component; leave --components out"):
        evaluate(floats, floats, HOW, components=True)


def test_the_gate_prints_them_when_asked(result, tmp_path):
    for name in ("run", "base"):
        (tmp_path / name).mkdir()
        text = run_file.text(result.to_json())
        (tmp_path / name / "eval.json").write_text(text)
    command = ["gate", "check", str(tmp_path / "run"), "--baseline", str(tmp_path / "base")]
    plain, shown = (CliRunner().invoke(main, [*command, *more]) for more in ([], ["--components"]))
    assert plain.exit_code == shown.exit_code
    assert shown.stdout.count("text_encoder ") == 2
    assert "text_encoder " not in plain.stdout
    read = run_file.read(tmp_path / "run").components
    assert read == result.run.components
    assert all(math.isfinite(row.divergence) for row in read)
    result.run.components.clear()
    (tmp_path / "base" / "eval.json").write_text(run_file.text(result.to_json()))
    told = CliRunner().invoke(main, [*command, "--components"])
    assert told.exit_code == 3
    assert f"{tmp_path / 'base'}: has no errors of components; dtq eval --components" in told.stderr
