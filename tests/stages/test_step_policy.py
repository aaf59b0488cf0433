# SPDX-License-Identifier: Apache-2.0
"""The step policy: searched, written, read back, obeyed without a new graph."""

from __future__ import annotations

import itertools
import json

import pytest
import tiny
import torch
from conftest import QUICK
from diffusers import DiffusionPipeline
from torch._dynamo.testing import CompileCounter

import dtq
from dtq.checkpoint import writer
from dtq.errors import CheckpointError, RecipeError
from dtq.nn.linear import QuantLinear
from dtq.nn.timestep_hook import install_clock
from dtq.plan.step_policy import StepPolicy
from dtq.recipe import Recipe

STEPS = {"precisions": ["native", "a8"], "budget": 0.5, "num_bins": 4, "num_inputs": 1}
COARSE = {
    "activations": "int4-row",
    "transform": "hadamard",
    "solver": "rtn",
    "promote": {"to": ""},
}


@pytest.fixture(scope="module")
def pipe():
    return dtq.quantize(
        tiny.pipeline(), "w4a8", progress=False, step_policy=STEPS, **COARSE, **QUICK
    )


def run(model, t: float) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x, timestep=torch.tensor([t, t]), class_labels=torch.tensor([1, 2]))[0]


def test_the_search_spends_its_budget_where_it_helps(pipe):
    policy = pipe.transformer.hf_quantizer.report.step_policy
    assert set(policy["modes"]) == {"native", "a8"}
    dear = sum(c for c, m in zip(policy["counts"], policy["modes"], strict=True) if m == "a8")
    assert 0 < dear <= 0.5 * policy["num_inference_steps"]
    free = dtq.quantize(
        tiny.pipeline(),
        "w4a8",
        progress=False,
        step_policy={**STEPS, "budget": 1.0},
        **COARSE,
        **QUICK,
    )
    assert free.transformer.hf_quantizer.report.step_policy["modes"] == ["a8"]


def test_each_range_runs_in_its_own_format(pipe):
    model, policy = pipe.transformer, pipe.transformer.hf_quantizer.report.step_policy
    edges = [0.0, *policy["edges"], 1000.0]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    obeyed = [run(model, t) for t in middles]
    found = StepPolicy.from_json(policy, "here")
    for t, mode, got in zip(middles, policy["modes"], obeyed, strict=True):
        install_clock(model, (), StepPolicy((), (mode,)))
        assert torch.equal(run(model, t), got)
        other = "a8" if mode == "native" else "native"
        install_clock(model, (), StepPolicy((), (other,)))
        assert not torch.equal(run(model, t), got)
    install_clock(model, (), found)


def test_it_is_saved_and_obeyed_by_a_plain_pipeline(pipe, tmp_path):
    writer.write(pipe, tmp_path / "out")
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    stored = config["quantization_config"]["runtime"]["diffusion_step_policy"]
    assert stored == pipe.transformer.hf_quantizer.report.step_policy
    assert stored["schema_version"] == 1
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(tiny.sample(loaded), tiny.sample(pipe))
    plain = dtq.quantize(tiny.pipeline(), "w4a8", progress=False, **COARSE, **QUICK)
    assert not torch.equal(tiny.sample(loaded), tiny.sample(plain))


def test_no_step_compiles_a_new_graph(pipe):
    model = pipe.transformer
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    frames = []
    for t in (999.0, 700.0, 400.0, 100.0, 1.0):
        torch.testing.assert_close(run(compiled, t), run(model, t))
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1  # nothing is compiled after the first call


def test_a16_is_the_layer_without_activation_rounding():
    model = dtq.quantize(tiny.dit(), "w4a8", progress=False, **COARSE, **QUICK)
    install_clock(model, (), StepPolicy((), ("a16",)))
    layers = [
        m for m in model.modules() if isinstance(m, QuantLinear) and m.activation_format != "none"
    ]
    x = torch.randn(5, layers[0].in_features)
    with torch.no_grad():
        want = x @ layers[0].dequantize().T + layers[0].bias
        torch.testing.assert_close(layers[0](x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("modes", "counts", "kind"),
    [
        (("a16", "native", "a16"), (2, 6, 3), "first_last_n"),
        (("native", "a16"), (7, 3), "first_last_n"),
        (("native", "a16", "native"), (2, 6, 3), "bins"),
        (("a8", "native", "a16"), (2, 6, 3), "bins"),
    ],
)
def test_the_form_others_read_is_used_where_it_says_the_same(modes, counts, kind):
    edges = tuple(250.0 * (i + 1) for i in range(len(modes) - 1))
    policy = StepPolicy(edges, modes, sum(counts), counts)
    data = policy.to_json()
    assert data["type"] == kind
    assert StepPolicy.from_json(data, "here") == policy
    if kind == "first_last_n":
        # the last range is the noisiest, which the sampler visits first
        assert data["first_steps"]["count"] == (counts[-1] if modes[-1] != "native" else 0)
        assert data["last_steps"]["count"] == (counts[0] if modes[0] != "native" else 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modes": ["a8"]}, "one more"),
        ({"modes": ["a9", "a8"]}, "a16"),
        ({"edges": [3, 1]}, "rising"),
        ({"edges": None}, "edges"),
        ({"counts": ["x"]}, "whole numbers"),
    ],
)
def test_a_damaged_policy_is_refused(change, says):
    data = StepPolicy((500.0,), ("native", "a16"), 10, (5, 5)).to_json() | change
    with pytest.raises(CheckpointError, match=says):
        StepPolicy.from_json(data, "config.json")


def test_unknown_modes_are_refused_in_the_recipe():
    with pytest.raises(RecipeError, match="a9"):
        Recipe.load("w4a8", step_policy={"precisions": ["a9"]})
