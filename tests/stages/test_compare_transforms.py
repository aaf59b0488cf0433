# SPDX-License-Identifier: Apache-2.0
"""Transforms compared on the whole model."""

from __future__ import annotations

import logging

import tiny
import torch
from builders import EVERYTHING, planned
from conftest import QUICK, hasty

import dtq
from dtq.calibrate.engine import calibrate
from dtq.nn import QuantLinear
from dtq.pipelines.loading import LoadedModel, load_transformer
from dtq.pipelines.settings import SamplingSettings
from dtq.recipe import Recipe
from dtq.stages import record_calls

HOW = SamplingSettings(samples=4, steps=4, batch_size=4, seed=99)


def test_a_better_transform_of_the_whole_model_replaces_the_search():
    pipe = tiny.pipeline()
    recipe = hasty("w4a8", transform_candidates=["hadamard", "none"])
    dtq.quantize(pipe, recipe, progress=False)
    report = pipe.transformer.hf_quantizer.report
    assert list(report.transform_errors) == ["search", "hadamard", "none"]
    best = min(report.transform_errors, key=report.transform_errors.get)
    labels = {x.transform for x in report.layers if x.role != "adaln"}
    if best != "search":
        assert len(labels) == 1
    alone = tiny.pipeline()
    transform = {} if best == "search" else {"transform": best}
    dtq.quantize(alone, hasty("w4a8", transform_candidates=[], **transform), progress=False)
    assert torch.equal(tiny.sample(alone), tiny.sample(pipe))


def test_a_candidate_may_transform_the_input_where_the_recipe_does_not():
    how = {"promote": {"to": ""}, "correct_bias": False, **QUICK}
    pipe, alone = tiny.pipeline(), tiny.pipeline()
    more = {"transform": "none", "solver": "rtn", "transform_candidates": ["smooth", "hadamard"]}
    dtq.quantize(pipe, "w4a8", progress=False, **more, **how)
    found = pipe.transformer.hf_quantizer.report.transform_errors
    assert list(found) == ["none", "smooth", "hadamard"]
    assert max(found.values()) < 10 * min(found.values())
    plan = pipe.transformer.hf_quantizer.report.plan
    before = planned(load_transformer(alone), Recipe.load("w4a8", **more, **how)).plan
    assert [x.nbytes() for x in before.layers] == [x.nbytes() for x in plan.layers]


def test_without_a_pipeline_transforms_are_not_compared(caplog):
    source = LoadedModel("x", None, "transformer", tiny.dit())
    scan = planned(source, Recipe.load("w4a8")).scan
    stats = calibrate(
        source, scan.input_groups, hasty("w4a8").calibration, EVERYTHING, progress=False
    )
    with caplog.at_level(logging.WARNING, "dtq"):
        model = dtq.quantize(source.model, hasty("w4a8"), statistics=stats, progress=False)
    assert model.hf_quantizer.report.transform_errors == {}
    assert "search stays, without trying hadamard" in caplog.text


def test_transforms_are_compared_on_calls_of_the_float_pipeline(monkeypatch):
    """Else those of the second transformer depend on whether this process changed the first."""
    pipe, quantized = tiny.two_stages(), []
    before = record_calls.sample_calls

    def sampled(*arguments, **options):
        models = (pipe.transformer, pipe.transformer_2)
        quantized.append([any(isinstance(m, QuantLinear) for m in x.modules()) for x in models])
        return before(*arguments, **options)

    monkeypatch.setattr(record_calls, "sample_calls", sampled)
    dtq.quantize(pipe, "rtn-w4a8", transform_candidates=["hadamard"], progress=False, **QUICK)
    assert quantized == [[False, False], [False, False]]
    assert all(
        len(m.hf_quantizer.report.transform_errors) == 2
        for m in (pipe.transformer, pipe.transformer_2)
    )
