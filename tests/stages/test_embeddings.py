# SPDX-License-Identifier: Apache-2.0
"""``--embeddings`` for whole pipelines: plan, quantize, load, inspect, refuse."""

from __future__ import annotations

import json

import pipelines
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from torch import nn

import dtq
from dtq.checkpoint.reader import verify
from dtq.cli import main
from dtq.errors import InputError
from dtq.nn.embedding import QuantEmbedding

SMALL = pipelines.SMALL["flux"]
FEW = ("--recipe=rtn-w4a8", "--samples=2", "--steps=2", "--set=calibration.batch_size=2")
FEW += tuple(f"--arg={key}={value}" for key, value in SMALL.items())
TABLES = {
    "text_encoder": ["embeddings.token_embedding"],
    "text_encoder_2": ["shared", "encoder.embed_tokens"],
}


def command(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output if code else result.stdout


def tables(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, QuantEmbedding)]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A float Flux pipeline, what the command line makes of it, and what it prints."""
    folder = tmp_path_factory.mktemp("flux")
    pipelines.flux().save_pretrained(folder / "float")
    options = (*FEW, "--text-encoder=rtn-w4a8", "--embeddings=w8")
    planned = json.loads(command("plan", folder / "float", *options, "--json"))
    told = command("quantize", folder / "float", *options, "-o", folder / "q")
    return folder, planned, told


def test_the_command_line_packs_the_tables_of_text_encoders(flux):
    folder, planned, told = flux
    for name in TABLES:
        (file,) = (folder / "q" / name).glob("*.safetensors")
        assert file.stat().st_size == planned[name]["bytes"]
    assert "table of embeddings shared in int8-row: " in told
    assert "linears and 1 table of embeddings quantized" in told
    assert [*verify(folder / "q")] == ["transformer", *TABLES]
    shown = command("inspect", folder / "q")
    assert "quantized linears and 1 table of embeddings" in shown
    (row,) = (line for line in shown.splitlines() if line.startswith("shared "))
    assert "float rows of the unpacked table" in row
    assert "encoder.embed_tokens" not in shown  # it has no tensors of its own
    assert "1 table of embeddings" in (folder / "q" / "README.md").read_text()


def test_the_plan_prints_the_saving(flux):
    folder, _, _ = flux
    shown = command("plan", folder / "float", *FEW, "--text-encoder=rtn-w4a8", "--embeddings=w4")
    lines = [line for line in shown.splitlines() if line.startswith("table of embeddings")]
    assert len(lines) == len(TABLES)
    assert all(" kB to " in line or " B to " in line for line in lines)
    assert "also the weight of encoder.embed_tokens" in shown


def test_a_loaded_pipeline_samples_on_packed_tables(flux):
    folder, _, _ = flux
    pipe = DiffusionPipeline.from_pretrained(folder / "q")
    assert {name: tables(getattr(pipe, name)) for name in TABLES} == TABLES
    images = pipelines.sample(pipe, "flux", 1)
    assert images.isfinite().all()
    ids = torch.arange(12)
    for name in TABLES:
        encoder = getattr(pipe, name)
        rows = encoder.get_input_embeddings()(ids)
        encoder.dequantize()
        assert tables(encoder) == []
        assert torch.equal(encoder.get_input_embeddings()(ids), rows)


def test_a_budget_counts_the_packed_tables(flux):
    folder, _, _ = flux
    least = {}
    for choice in ("keep", "w8"):
        options = (*FEW, "--budget=1GB", f"--embeddings={choice}", "--json")
        told = json.loads(command("plan", folder / "float", *options))
        least[choice] = told["transformer"]["pipeline"]["least"]
    assert all(least["w8"][name] < least["keep"][name] for name in TABLES)
    pipe = DiffusionPipeline.from_pretrained(folder / "float")
    dtq.quantize(
        pipe, "rtn-w4a8", budget="1GB", embeddings="w8", progress=False, sanity_check=False,
        calibration={"samples": 2, "batch_size": 2, "steps": 2, "pipeline_args": SMALL},
        allocate={"num_inputs": 1},
    )  # fmt: skip
    assert {name: tables(getattr(pipe, name)) for name in TABLES} == TABLES


@pytest.mark.parametrize("text_encoder", [None, "keep"])
def test_a_format_of_tables_needs_quantized_text_encoders(text_encoder):
    with pytest.raises(InputError, match="none is quantized: give a recipe for the text encoders"):
        dtq.quantize(pipelines.flux(), "rtn-w4a8", embeddings="w8", text_encoder=text_encoder)


def test_the_sanity_check_compares_with_the_float_table(flux):
    """It puts the float modules back, those that are tied to a table among them."""
    pipe = DiffusionPipeline.from_pretrained(flux[0] / "float")
    encoder = pipe.text_encoder_2
    ids = torch.arange(12).reshape(1, -1)
    dtq.quantize(encoder, "w4a16", inputs=[{"input_ids": ids}], embeddings="w4", progress=False)
    checked = encoder.hf_quantizer.report.sanity_check
    assert checked["promoted"] == []
    assert tables(encoder) == TABLES["text_encoder_2"]
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
