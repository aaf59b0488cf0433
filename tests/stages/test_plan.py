# SPDX-License-Identifier: Apache-2.0
"""Models and arguments that cannot be quantized as they are: refused in one line."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import torch
import zoo

import dtq
from dtq.errors import InputError

BROADCAST = diffusers.PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
)


def refused(model, says: str, **options) -> None:
    with pytest.raises(InputError, match=says):
        dtq.quantize(model, "w4a16", progress=False, **options)


@pytest.mark.parametrize("name", zoo.FIVE)
def test_a_compiled_model_is_refused(name):
    blocks = zoo.model(name)
    if getattr(blocks, "_repeated_blocks", None):
        blocks.compile_repeated_blocks()
        refused(blocks, "compile it afterwards")
    whole, forward = zoo.model(name), zoo.model(name)
    whole.compile()
    forward.forward = torch.compile(forward.forward)
    for model in (whole, forward, torch.compile(zoo.model(name))):
        refused(model, "compile it afterwards")


@pytest.mark.parametrize("name", zoo.FIVE)
def test_a_model_with_a_cache_is_refused_until_the_cache_is_off(name):
    model = zoo.model(name)
    diffusers.hooks.apply_pyramid_attention_broadcast(model, BROADCAST)
    refused(model, "disable_cache")
    if not isinstance(model := zoo.model(name), diffusers.models.cache_utils.CacheMixin):
        return
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    refused(model, "disable_cache")
    model.disable_cache()
    dtq.quantize(model, "w4a16", progress=False)


def test_a_compiled_transformer_of_a_pipeline_is_refused():
    pipe = tiny.pipeline()
    pipe.transformer = torch.compile(pipe.transformer)
    refused(pipe, "compile it afterwards")


@pytest.mark.parametrize("empty", [[], ()])
def test_no_component_is_refused(empty):
    refused(tiny.pipeline(), "component is empty; name one or more of transformer", component=empty)


def test_a_component_that_is_named_twice_is_quantized_once():
    pipe = tiny.two_stages()
    dtq.quantize(pipe, "w4a16", progress=False, component=["transformer"] * 2)
    assert not any(isinstance(m, dtq.QuantLinear) for m in pipe.transformer_2.modules())


@pytest.mark.parametrize("name", zoo.FIVE)
def test_inputs_that_the_model_refuses_are_named(name):
    model, call = zoo.model(name), zoo.inputs(name)
    refused(model, r"rejected the call \(TypeError.*inputs\[0\]", inputs=[{**call, "nothing": 1}])
    short = {**call, "hidden_states": call["hidden_states"][..., :0]}
    refused(model, r"rejected the call .*inputs\[1\]", inputs=[call, short])
    refused(model, "expected a list of mappings", inputs=call)


def test_a_label_beyond_the_models_is_refused_in_one_line():
    model, call = tiny.dit(), zoo.inputs("DiTTransformer2DModel")
    call = {**call, "hidden_states": torch.randn(1, 4, 8, 8), "class_labels": torch.tensor([2000])}
    call["timestep"] = torch.tensor([500])
    refused(model, r"rejected the call \(IndexError", inputs=[call])
