# SPDX-License-Identifier: Apache-2.0
"""Calibration that would die or mislead: no text encoder, no call, no row, another default dtype."""

from __future__ import annotations

import copy

import pipelines
import pytest
import tiny
import torch
import zoo
from builders import EVERYTHING, collected, planned, quantized
from conftest import hasty

import dtq
from dtq.errors import InputError
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.tracing import dummy_inputs


@pytest.mark.parametrize("name", pipelines.PIPELINES)
@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_pipeline_without_text_encoders_is_refused_by_name(name, part):
    pipe = pipelines.PIPELINES[name]()
    pipe.register_modules(**{n: None for n in pipe.components if n.startswith(part)})
    small = {"samples": 1, "steps": 1, "pipeline_args": pipelines.SMALL[name]}
    with pytest.raises(InputError, match=rf"has no {part}.*inputs="):
        dtq.quantize(pipe, "w4a8", progress=False, calibration=small)


def test_a_transformer_that_is_never_called_is_named_before_anything_changes():
    pipe = pipelines.wan(two=True)
    few = {"samples": 1, "steps": 1, "pipeline_args": pipelines.SMALL["wan 2.2"]}
    for more in ({}, {"weights": "int8-row", "transform": "none", "solver": "rtn"}):
        with pytest.raises(InputError, match=r"never called transformer_2 in 1 steps.*--steps"):
            dtq.quantize(pipe, "w4a8", progress=False, calibration=few, **more)
    assert not any(isinstance(m, dtq.QuantLinear) for m in pipe.transformer.modules())
    dtq.quantize(pipe, "w8a8", progress=False, calibration=few, component="transformer")
    assert any(isinstance(m, dtq.QuantLinear) for m in pipe.transformer.modules())


@pytest.mark.parametrize("at", [0, 1])
def test_inputs_with_samples_of_different_timesteps_are_refused(at):
    model = tiny.dit()
    calls = [dummy_inputs(model, 2, t, 0) for t in (900.0, 100.0)]
    calls[at] = calls[at] | {"timestep": torch.tensor([900, 100])}
    with pytest.raises(InputError, match="samples of different timesteps in one call"):
        dtq.quantize(model, "w4a8", inputs=calls, progress=False)
    assert not any(isinstance(m, dtq.QuantLinear) for m in model.modules())


def test_the_sanity_check_reaches_a_transformer_of_the_last_steps():
    pipe = tiny.two_stages()
    late = {"samples": 1, "batch_size": 1, "steps": 10}
    call = type(pipe).__call__

    def first_nine_steps(
        self, class_labels, generator=None, num_inference_steps=4, output_type="pt"
    ):
        held = self.transformer_2
        self.transformer_2 = held if num_inference_steps > 8 else self.transformer
        try:
            return call(self, class_labels, generator, num_inference_steps, output_type)
        finally:
            self.transformer_2 = held

    patched = type("Late", (type(pipe),), {"__call__": first_nine_steps})
    pipe.__class__ = patched
    dtq.quantize(pipe, "w8a8", progress=False, calibration=late)
    assert pipe.transformer_2.hf_quantizer.report.sanity_check["calls"] > 0


# the default recipe on every class, the others on one each
@pytest.mark.parametrize(
    ("recipe", "more", "name"),
    [
        *(("w4a8", {}, name) for name in zoo.FIVE),
        ("svdquant", {}, "SD3Transformer2DModel"),
        ("ptq4dit", {}, "FluxTransformer2DModel"),
        ("w8a8", {"activations": "int8-static-timestep"}, "WanTransformer3DModel"),
    ],
)
def test_a_layer_that_no_row_reached_is_quantized_without_data(recipe, more, name):
    loaded = LoadedModel(name, None, "transformer", zoo.model(name))
    chosen, calls = hasty(recipe, **more), [zoo.inputs(name)]
    statistics = collected(loaded, chosen, EVERYTHING, inputs=calls)
    run = planned(loaded, chosen, inputs=calls)
    group = next(
        g for g in run.scan.input_groups if any(x.name in map(_name, run.plan.gemm()) for x in g.linears)
    )  # fmt: skip
    statistics.inputs = {n: s for n, s in statistics.inputs.items() if n != group.name}
    report = quantized(loaded, chosen, inputs=calls, statistics=statistics)
    layers = {x.name: x for x in report.plan.gemm()}
    without = [layers[x.name] for x in group.linears if x.name in layers]
    assert without
    for layer in without:
        assert "no row reached it" in layer.note
        assert "static" not in layer.activation_format
    assert all(p.isfinite().all() for p in loaded.model(**calls[0], return_dict=False)[0])


def _name(layer) -> str:
    return layer.name


@pytest.mark.parametrize("name", zoo.FIVE)
def test_the_default_dtype_changes_nothing(name, tmp_path):
    recipe, dtype = "w4a4", torch.bfloat16
    model, calls = zoo.model(name), [zoo.inputs(name)]
    twin = copy.deepcopy(model)
    dtq.quantize(model, hasty(recipe), inputs=calls, progress=False)
    torch.set_default_dtype(dtype)
    try:
        dtq.quantize(twin, hasty(recipe), inputs=calls, progress=False)
        assert torch.get_default_dtype() == dtype
        twin.save_pretrained(tmp_path)
        loaded = type(twin).from_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    want, got = model.state_dict(), twin.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    outputs = [m(**calls[0], return_dict=False)[0] for m in (model, twin, loaded)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", zoo.FIVE)
def test_a_quantized_layer_runs_under_another_default_dtype(name):
    model, calls = zoo.model(name), [zoo.inputs(name)]
    dtq.quantize(model, hasty("w4a4"), inputs=calls, progress=False)
    layer = next(m for m in model.modules() if isinstance(m, dtq.QuantLinear) and not m.spatial)
    x = torch.randn(3, layer.in_features)
    want = layer(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(layer(x), want)
        assert torch.equal(layer.dequantize(), layer.dequantize(torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
